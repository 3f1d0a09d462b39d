"""What models hold while nothing is computed: weights, gradients and optimiser states (training/engines.py,
training/deepspeed_engine.py), split by ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054)."""

from dataclasses import dataclass

from dgpo_core.config.training import DEFAULT_ZERO_STAGE, ComputeConfig
from dgpo_core.planning import passes
from dgpo_core.planning.architectures import Architecture

BUCKET = 5e8  # elements that DeepSpeed reduces at once (zero_optimization.reduce_bucket_size)
LIVE = 1e9  # elements up to which ZeRO-3 leaves weights whole (stage3_max_live_parameters)
Parts = dict[str, float]


def zero_stage(compute: ComputeConfig) -> int | None:
    """Of DeepSpeed's ZeRO, None with plain torch."""
    return (compute.zero_stage or DEFAULT_ZERO_STAGE) if compute.engine == "deepspeed" else None


def trained_parameters(shape: Architecture, compute: ComputeConfig, critic: bool = False) -> int:
    """Numbers that are trained: the adapters, or all; a critic is a copy of the backbone, adapters included
    (its head is left out: one number for each hidden channel)."""
    whole = shape.backbone if critic else shape.parameters
    return shape.adapters(passes.rank(compute)) or whole


@dataclass(frozen=True)
class Holding:
    """Bytes in each process, part by part."""

    compute: ComputeConfig

    def trained(self, shape: Architecture, critic: bool = False) -> Parts:
        """On the device, outside of passes: of the student, or of the critic made of it."""
        parts = self._torch(shape, critic) if self._zero is None else self._deepspeed(shape, critic)
        return {("critic " if critic else "") + part: size for part, size in parts.items() if size}

    def _torch(self, shape: Architecture, critic: bool) -> Parts:
        """16 bytes a trained number in float32; what adapters leave frozen in the precision of compute. A
        critic's gradients exist in its own update only, when the actor's are gone."""
        compute, numbers = self.compute, trained_parameters(shape, self.compute, critic)
        frozen = self._whole(shape, critic) - numbers
        width = 2 if compute.precision == "bfloat16" else 4
        gradients = 0 if critic else 4 * numbers
        return {"weights": 4 * numbers + width * frozen, "gradients": gradients, "optimizer": 8 * numbers}

    def _deepspeed(self, shape: Architecture, critic: bool) -> Parts:
        """Weights in the precision of compute, float32 masters and moments; gradients are summed in float32,
        which ZeRO-1 does beside those in bfloat16. ZeRO-3 trains a copy of a model that generates."""
        compute, shares, width = self.compute, self.compute.processes, self._width
        zero, numbers = zero_stage(compute) or DEFAULT_ZERO_STAGE, trained_parameters(shape, compute, critic)
        weights = width * self._whole(shape, critic)
        beside = 2 if width == 2 and not compute.offload else 0
        sums: float = (4 + beside) * numbers if zero == 1 else 4 * numbers / shares
        return {
            "weights": weights / (shares if zero == 3 else 1),
            "weights for rollouts": weights if zero == 3 and not critic else 0,
            "gradients": 0 if compute.offload and zero > 1 else sums,
            "optimizer": 0 if compute.offload else 12 * numbers / shares,
            "buckets": self._buckets(zero, critic),
        }

    def _buckets(self, zero: int, critic: bool) -> float:
        """ZeRO-3 keeps one for each engine, ZeRO-2 has one while a backward pass runs; so has ZeRO-1, with
        sums in float32, unless DeepSpeed's plain bfloat16 optimiser does its work."""
        if zero == 1:
            plain = self._width == 2 and not self.compute.offload
            return 0 if plain or critic else 4 * BUCKET
        return 0 if zero == 2 and critic else self._width * BUCKET

    def offloaded(self, shape: Architecture, critic: bool = False) -> float:
        """In the host's memory, by all processes of one machine: masters, moments and their gradients, and
        from ZeRO-2 on the sums of the passes."""
        if not self.compute.offload:
            return 0.0
        numbers = trained_parameters(shape, self.compute, critic)
        return (16.0 if zero_stage(self.compute) == 1 else 20.0) * numbers

    def cast(self, shape: Architecture, precision: str) -> Parts:
        """bfloat16 copies that autocast keeps of trained float32 weights during a pass of the student."""
        if precision == "float32" or passes.numerics(self.compute) == "bfloat16":
            return {}
        adapters = shape.adapters(passes.rank(self.compute))
        return {"cast": 2.0 * adapters or passes.cast_bytes(shape, precision)}

    def gathered(self, shape: Architecture) -> Parts:
        """Weights that ZeRO-3 makes whole for a pass: up to a limit it leaves them so until its end."""
        whole = zero_stage(self.compute) == 3
        return {"gathered weights": self._width * min(self._whole(shape), LIVE)} if whole else {}

    def frozen(self, shape: Architecture, name: str) -> Parts:
        """A model that is only asked, beside one in training. Plain torch has it in float32, with autocast's
        copies; DeepSpeed in the precision of compute, split except for its output embedding on request."""
        if self._zero is None:
            return loaded(shape, name, self.compute.precision)
        if not self.compute.split_teacher:
            return {f"{name}weights": self._width * float(shape.parameters)}
        head, backbone = shape.vocabulary * shape.hidden, shape.backbone
        return {
            f"{name}weights": self._width * (backbone / self.compute.processes + head),
            f"{name}gathered": self._width * min(backbone, LIVE),
        }

    @property
    def _zero(self) -> int | None:
        return zero_stage(self.compute)

    @property
    def _width(self) -> float:
        """Bytes of one of DeepSpeed's weights."""
        return 2.0 if self.compute.precision == "bfloat16" else 4.0

    def _whole(self, shape: Architecture, critic: bool = False) -> int:
        own = shape.backbone if critic else shape.parameters
        return own + shape.adapters(passes.rank(self.compute))


def loaded(shape: Architecture, name: str, precision: str) -> Parts:
    """A model as it is loaded: in float32 (training/models.py), with autocast's copies."""
    cast = passes.cast_bytes(shape, precision)
    return {f"{name}weights": 4.0 * shape.parameters} | ({f"{name}cast": cast} if cast else {})
