from tests.dgpo_core.reporting.conftest import reported, run  # noqa: F401  fixtures
