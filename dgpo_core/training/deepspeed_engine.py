"""DeepSpeed's ZeRO as a training engine: the only file that imports deepspeed.

Weights are bfloat16 with float32 masters, or float32; AdamW is torch's, so nothing is compiled. A checkpoint
has every parameter and its moments gathered whole: what is saved does not depend on how it was split.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from dgpo_core.config.training import DEFAULT_ZERO_STAGE, ComputeConfig
from dgpo_core.training.batches import TokenSequence, backbone_of, collate, head_of
from dgpo_core.training.checkpoint import Weights, put_weights, trainable
from dgpo_core.training.optimizer import Optimization, adamw
from dgpo_core.training.parallel import leads, processes, rank

# on a CPU DeepSpeed would compile a collective of its own (40 s); gloo has one
deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False

Item = TypeVar("Item")
Result = TypeVar("Result")

MOMENTS = ("exp_avg", "exp_avg_sq")
PERSISTENT = 10_000  # elements up to which stage 3 keeps a weight whole: norms and biases


class ZeroEngine:
    """Splits optimiser state, gradients and, with stage 3, weights over the processes.

    Stages 1 and 2 train `module` in place. Stage 3 trains a copy where the module is to be `published`: then
    its weights are gathered into `module` once, before thousands of tokens are generated.
    """

    lockstep = True
    spent = False

    def __init__(
        self, module: torch.nn.Module, how: Optimization, compute: ComputeConfig, published: bool
    ) -> None:
        self._stage = compute.zero_stage or DEFAULT_ZERO_STAGE
        self._module, self.updates = module, 0
        self._trained = copy.deepcopy(module) if published and self._stage == 3 else module
        exact = [p.detach().float().cpu() for p in module.parameters() if p.requires_grad]
        optimizer = adamw(
            [p for p in self._trained.parameters() if p.requires_grad], how.learning_rate, how.weight_decay
        )
        # DeepSpeed takes no empty group: adapters are matrices only
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        self._schedule = LambdaLR(optimizer, how.schedule)
        self._optimizer = optimizer
        config = _config(compute, self._stage) | {"gradient_clipping": how.max_grad_norm}
        self._engine, *_ = deepspeed.initialize(model=self._trained, optimizer=optimizer, config=config)
        if compute.precision == "bfloat16":
            for parameter, value in zip(self._parameters(), exact, strict=True):
                self._set(parameter, value)  # DeepSpeed makes its masters of rounded weights
            if self._trained is not module:
                _to(module, torch.bfloat16)
        self.publish()

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def learning_rate(self) -> float:
        return float(self._schedule.get_last_lr()[0])

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def accumulate(
        self, loss: Callable[[Item], tuple[torch.Tensor, Result]], items: Iterable[Item]
    ) -> list[Result]:
        results = []
        for item in items:
            value, result = loss(item)
            self._backward(value)
            results.append(result)
        return results

    def _backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages over processes, whose micro-batches are shares of one sum
        self._engine.backward(loss * processes(), scale_wrt_gas=False)

    def step(self) -> float:
        self.updates += 1
        self._engine.step()
        self._schedule.step()
        norm = float(self._engine.get_global_grad_norm())
        self.spent = not 0 <= norm < math.inf  # -1 is DeepSpeed's word for one that is nan or infinite
        return math.nan if self.spent else norm

    def discard(self) -> None:
        """Spend the engine: DeepSpeed keeps gradients where it likes, and clears them by an update alone."""
        self.spent = True

    def publish(self) -> None:
        if self._trained is self._module:
            return
        pairs = zip(self._trained.parameters(), self._module.parameters(), strict=True)
        for source, whole in pairs:
            if whole.requires_grad:
                with deepspeed.zero.GatheredParameters([source]):
                    whole.data.copy_(source.data)

    def weights(self) -> Weights:
        return {name: self._whole(p) for name, p in trainable(self._trained)}

    def finish(self, weights: Weights | None = None) -> None:
        exact = weights or self.weights()
        self._engine.destroy()
        self._module.to("cpu", torch.float32)
        put_weights(self._module, exact)

    def state_dict(self) -> dict[str, Any]:
        """Return the state; only the first process, which saves it, has the tensors."""
        steps = self._steps()
        state: dict[str, Any] = {"schedule": self._schedule.state_dict(), "steps": steps, "parameters": {}}
        self._link_moments()
        for name, parameter in trainable(self._trained):
            moments = MOMENTS if steps else ()
            whole = [self._whole(parameter, key) for key in (None, *moments)]
            if leads():
                state["parameters"][name] = whole
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["steps"]:
            self._make_moments()
        for parameter, whole in zip(self._parameters(), state["parameters"].values(), strict=True):
            for key, value in zip((None, *MOMENTS), whole, strict=False):
                self._set(parameter, value, key)
        for moments in self._optimizer_states():
            moments["step"].fill_(state["steps"])
        self._schedule.load_state_dict(state["schedule"])
        for group, rate in zip(self._optimizer.param_groups, self._schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.publish()

    def _make_moments(self) -> None:
        """Take a step of gradient 0, before which AdamW has no state; all that it does is replaced."""
        result = self(collate([TokenSequence([0, 0], [1])], self.device))
        self._backward(0 * result.sum())
        self._engine.step()
        self._link_moments()

    def _link_moments(self) -> None:
        """Let stages 1 and 2 look for moments again.

        DeepSpeed 0.19 looks after it has stepped the first of our two parameter groups, and so never finds
        those of the second.
        """
        if self._stage < 3 and self._optimizer_states():
            zero = self._engine.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in trainable(self._trained)]

    def _optimizer_states(self) -> list[dict[str, torch.Tensor]]:
        return list(self._optimizer.state.values())

    def _steps(self) -> int:
        """Return the number of updates so far."""
        return int(next((moments["step"] for moments in self._optimizer_states()), torch.tensor(0)))

    def _whole(self, parameter: torch.nn.Parameter, moment: str | None = None) -> torch.Tensor:
        """Return the float32 master of a parameter, or one of its moments, on the CPU."""
        whole: torch.Tensor
        if moment is None:
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, moment)
        return whole.cpu()

    def _set(self, parameter: torch.nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
        """Put this process's part of a whole master or moment in its place, and the weight that follows."""
        value = value.to(self.device)
        if self._stage == 3:
            part = _part(parameter, value)
            if moment is not None:
                safe_set_local_optimizer_state(parameter, part, moment)
                return
            safe_set_local_fp32_param(parameter, part)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        elif moment is not None:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)


def frozen_parts(model: PreTrainedModel, compute: ComputeConfig) -> tuple[Any, torch.Tensor]:
    """Return backbone and output embedding of a model that is not trained, in the precision of compute.

    With `split_teacher` the backbone's weights are split. The output embedding stays whole: the student's
    backward pass uses it too.
    """
    _to(model, torch.bfloat16 if compute.precision == "bfloat16" else torch.float32)
    backbone, head = backbone_of(model), head_of(model).detach()
    if not compute.split_teacher:
        return backbone, head
    head = head.clone()
    engine, *_ = deepspeed.initialize(model=backbone, config=_config(compute, 3))
    return engine, head


def _to(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert parameters only: rotary frequencies stay float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _config(compute: ComputeConfig, stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": PERSISTENT}
    zero["overlap_comm"] = False
    if compute.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": compute.device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # a name only: micro-batches are cut by tokens
        "managed_gradient_accumulation": False,  # as many micro-batches a step as there are
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": compute.precision == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Cut out this process's part of a weight, of equal ones in stage 3, the last padded with zeros."""
    size = parameter.ds_tensor.numel()
    flat = value.flatten()
    flat = torch.nn.functional.pad(flat, (0, size * processes() - flat.numel()))
    return flat[rank() * size : (rank() + 1) * size]
