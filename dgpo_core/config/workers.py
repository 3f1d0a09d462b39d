"""Where the stages that run models are executed; nothing that they make depends on it."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from dgpo_core.config.base import Section


class WorkersConfig(Section):
    """Read by dvc.yaml into the stages' `meta`, which DVC does not hash."""

    pool: Literal["cpu", "gpu"] = Field("gpu", description="pool whose workers run the stages with models")
    gpus: NonNegativeInt = Field(1, description="slots of Prefect's limit `gpu` that such a stage takes")
    timeout_minutes: PositiveInt = Field(
        2880, description="after which a flow takes such a stage for hung and ends it; its checkpoint stays"
    )
