"""Prefect: when and where the stages run. The graph itself is DVC's (`dvc.yaml`)."""

from dgpo_core.installed import require_installed

require_installed()
