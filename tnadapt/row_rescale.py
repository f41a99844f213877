"""α-LoRA: a trained scale for each row of frozen weights, `W_new = diag(α) W + (LoRA's update)`.

Source: El Firdoussi, Chayti, Seddik, Jaggi, *α-LoRA: Effective Fine-Tuning via Base Model Rescaling*, arXiv:2510.21345.
α starts at 1 and has an optimizer of its own: every T steps of the adapter, it takes a step on a fresh mini-batch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnadapt.adapter.files import named, read_tensors, write_tensors
from tnadapt.adapter.targets import BaseLayer, base_layers, chosen_names
from tnadapt.factorizations import core_dtype
from tnadapt.factorizations.structure import is_count

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["RowRescale"]

_KIND = "tnadapt.row_rescale"
_STATE_VERSION = 1


class RowRescale:
    """Scales the rows of frozen linear weights by trained α, beside whatever adapter the layers have.

    A forward hook on each layer turns its output `W x + b` into `α (W x) + b`, before any adapter adds its update. So
    quantized layers work as plain ones do, and parameters, state dicts and PEFT's files stay what they are: α belongs to this
    object and not to the model. α requires a gradient during its own steps only; in all others it is a constant, and no
    activation is kept for it.

    Args:
        model: the model, or the wrapper around it that the loss calls. A `torch.compile`d one is given before its first call.
        targets: a regular expression that is searched for in the names of layers, or names. None: the base of every LoRA
            layer, as in the paper. The name of an adapted layer is that of the adapter, so a file fits with and without it.
        optimizer: makes the optimizer of α from its parameters, one vector for each layer:
            `lambda alphas: torch.optim.AdamW(alphas, lr=1e-2)`. None: α is applied and not trained.
        every: the period T, in steps of the adapter.

    Attributes:
        alphas: name of the layer -> α [d_out], float32, or the dtype of the weight where that is wider.
        optimizer: what the argument made; its rate may be scheduled like any other.
        steps: steps of the adapter so far.

    Raises:
        ValueError: no layer is meant, a layer is named twice, is not a linear layer, is trained, or has an α already; a DoRA
            layer; a bad `every`; an optimizer that does not hold exactly the α, or needs closures.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: str | Iterable[str] | None = None,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        every: int = 1,
    ) -> None:
        if not is_count(every):
            raise ValueError(f"every={every!r}: the period of α's steps is an integer of at least 1")
        self._layers = _chosen(model, targets)
        self.model, self.every, self.steps = model, every, 0
        self.alphas = {name: _ones(layer.module) for name, layer in self._layers.items()}
        self.optimizer = None if optimizer is None else _made(optimizer, self.alphas)
        self._ended: str | None = None
        self._hooks = [
            layer.module.register_forward_hook(_Scaling(self.alphas[name], layer.owner))
            for name, layer in self._layers.items()
        ]

    @classmethod
    def from_file(
        cls,
        model: nn.Module,
        file: str | Path,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        every: int = 1,
    ) -> RowRescale:
        """Put the α that `save` wrote on the layers of `model`.

        Raises:
            FileNotFoundError, ImportError: no file, or no safetensors.
            ValueError: the file is damaged or of another kind, names layers that the model has not, or has other shapes, NaN
                or infinity; otherwise as the class. Nothing is changed.
        """
        values, _ = read_tensors(file, _KIND)
        _check_values(values, _chosen(model, list(values)), f"in {file}")
        rescale = cls(model, list(values), optimizer=optimizer, every=every)
        rescale._set(values)
        return rescale

    # -- training -----------------------------------------------------------------------------------------------------

    def step(self, loss_fn: Callable[[], Tensor]) -> Tensor | None:
        """Call this after each step of the adapter's optimizer. On every T-th call, α takes its own step.

        Everything else that the model trains is frozen meanwhile, so its gradients stay as they are, accumulated ones included.
        In distributed training, the gradient of α is the mean over the ranks.

        Args:
            loss_fn: draws a fresh mini-batch and returns its loss. It is called only when α steps, so that no batch is
                drawn in vain.

        Returns:
            The loss, detached; None where α did not step.

        Raises:
            RuntimeError: α is merged, removed or has no optimizer; the loss does not depend on α; its gradient is not finite.
            TypeError: `loss_fn` is no function, or returns something else than a loss. α and the count of steps are as before,
                after any error.
        """
        self._require_attached("step")
        if self.optimizer is None:
            raise RuntimeError("this RowRescale has no optimizer, so α cannot step; give it optimizer=...")
        if (self.steps + 1) % self.every:
            self.steps += 1
            return None
        self.optimizer.zero_grad()
        try:
            with self._alone():
                loss = _loss_of(loss_fn)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            _average(self.alphas.values())
            self._check_gradients()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        self.steps += 1
        return loss.detach()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """α requires gradients and everything in the model does not."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for p in trained:
                p.requires_grad_(False)
            for alpha in self.alphas.values():
                alpha.requires_grad_(True)
            yield
        finally:
            for alpha in self.alphas.values():
                alpha.requires_grad_(False)
            for p in trained:
                p.requires_grad_(True)

    def _check_gradients(self) -> None:
        grads = {name: alpha.grad for name, alpha in self.alphas.items() if alpha.grad is not None}
        if not grads:
            raise RuntimeError(
                "the loss does not depend on any α: none of the scaled layers was called with gradients enabled. Compute the "
                "loss with the model that RowRescale was given, and attach before a compiled model is first called"
            )
        bad = [name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())]
        if bad:
            raise RuntimeError(
                f"the gradient of α of {named(bad)} is not finite, so α did not step; look at the loss of its mini-batch"
            )

    # -- the end ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> list[str]:
        """Multiply α into the weights, in place, and take the hooks away. Biases and adapters stay as they are.

        The product is computed in the wider dtype of the two and rounded once. To merge a LoRA pair too, merge α first.

        Returns:
            The names of the layers.

        Raises:
            RuntimeError: α is merged or removed already.
            TypeError: a weight has no values (meta device), or is quantized or sharded, so that it cannot hold the product. Keep α in its file beside the
                base, or dequantize the base before (in transformers: `model.dequantize()`), and attach with `from_file`.
            ValueError: a weight is used by another module too, or PEFT has merged an adapter into it. Nothing is changed.
        """
        self._require_attached("merge")
        for name, layer in self._layers.items():
            _check_mergeable(self.model, name, layer)
        for name, layer in self._layers.items():
            weight, alpha = layer.module.weight, self.alphas[name]
            weight.copy_(weight * alpha.to(weight.device)[:, None])
        self._end("merged")
        return list(self._layers)

    def remove(self) -> None:
        """Take the hooks away; the model computes what it did before. α stays in `alphas`.

        Raises:
            RuntimeError: α is merged or removed already.
        """
        self._require_attached("remove")
        self._end("removed")

    def _end(self, how: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._ended = how

    def _require_attached(self, what: str) -> None:
        if self._ended is not None:
            raise RuntimeError(
                f"cannot {what}: this RowRescale is {self._ended} already and no longer acts on the model"
            )

    # -- files and states ---------------------------------------------------------------------------------------------

    def save(self, file: str | Path) -> None:
        """Write α to a safetensors file of its own, one vector by the name of each layer.

        Raises:
            RuntimeError: α is merged, so that the file would scale the base once more.
            ImportError: safetensors is not installed.
        """
        self._require_attached("save")
        write_tensors(file, self.alphas, _KIND, {})

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: α, the state of its optimizer, and the count of steps; tensors and plain containers. It is a copy."""
        return {
            "version": _STATE_VERSION,
            "every": self.every,
            "steps": self.steps,
            "alphas": {name: alpha.detach().clone() for name, alpha in self.alphas.items()},
            "optimizer": None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Another `every` than that of the state is kept, with a warning.

        Raises:
            ValueError: the state is damaged, of another version, or of other layers; nothing is changed.
        """
        self._require_attached("load a state")
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"the state has version {state.get('version')!r}, this tnadapt reads {_STATE_VERSION}")
        lost = [part for part in ("every", "steps", "alphas", "optimizer") if part not in state]
        if lost:
            raise ValueError(
                f"the state lacks {', '.join(lost)}; it is damaged, or was not made by RowRescale.state_dict()"
            )
        values = state["alphas"]
        if list(values) != list(self.alphas):
            missing = [name for name in self.alphas if name not in values]
            other = [name for name in values if name not in self.alphas]
            raise ValueError(
                f"the state is of other layers, or has them in another order: without {named(missing) or 'none'} of the {len(self.alphas)} here, and with "
                f"{named(other) or 'none'} that are not; make the RowRescale with the targets of that run"
            )
        _check_values(values, self._layers, "in the state")
        if (state["optimizer"] is None) != (self.optimizer is None):
            raise ValueError(
                "the state was saved with an optimizer and there is none here"
                if self.optimizer is None
                else "the state was saved without an optimizer, so there is nothing to resume; use from_file"
            )
        if state["every"] != self.every:
            warnings.warn(
                f"the state was saved with every={state['every']}, this run has every={self.every}", stacklevel=2
            )
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self._set(values)
        self.steps = state["steps"]

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, alpha in self.alphas.items():
            alpha.copy_(values[name])

    def __repr__(self) -> str:
        end = "" if self._ended is None else f", {self._ended}"
        return f"RowRescale({len(self.alphas)} layers, every={self.every}, steps={self.steps}{end})"


class _Scaling:
    """The forward hook of one layer. A class, so that models with it can be pickled."""

    def __init__(self, alpha: nn.Parameter, owner: nn.Module | None) -> None:
        self.alpha = alpha
        self.owner = owner if hasattr(owner, "merged") else None

    def __call__(
        self, layer: nn.Module, inputs: tuple[Any, ...], output: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        if getattr(self.owner, "merged", False):
            raise RuntimeError(
                "PEFT has merged an adapter into a weight that RowRescale scales, so the adapter would be scaled too; call "
                "unmerge_adapter(), then merge the RowRescale before the adapter"
            )
        alpha = self.alpha.to(output.device)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        # Between α's steps nobody needs the unscaled output: F.linear does not keep it for its backward. Scaling in place
        # saves a second tensor of its size, whose allocation takes longer than the product. Other kinds of layers may
        # return views that autograd cannot change in place, and a low-precision sum with a bias would be rounded twice.
        in_place = (
            type(layer) is nn.Linear and not alpha.requires_grad and (bias is None or output.dtype == alpha.dtype)
        )
        # α stays in its own dtype and the product is rounded once; α rounded to bfloat16 would lose its small steps
        scaled = output.mul_(alpha) if in_place else output * alpha
        if bias is not None:
            # α (y - b) + b without the cancellation; exact at α = 1
            scaled.add_(bias * (1 - alpha))
        return scaled.to(output.dtype)


def _chosen(model: nn.Module, targets: str | Iterable[str] | None) -> dict[str, BaseLayer]:
    """The layers that `targets` means, in the order of the model, each fit to be scaled."""
    layers = base_layers(model)
    if targets is not None:
        chosen = {name: layers[name] for name in chosen_names(targets, layers)}
    else:
        chosen = {name: layer for name, layer in layers.items() if layer.owner is not None}
        if not chosen:
            raise ValueError(
                "the model has no LoRA layers whose base could be scaled; say which layers with targets=..."
            )
    for name, layer in chosen.items():
        _check_scalable(name, layer)
    return chosen


def _check_values(values: Mapping[str, Tensor], layers: Mapping[str, BaseLayer], where: str) -> None:
    for name, layer in layers.items():
        if values[name].shape != (layer.module.out_features,):
            raise ValueError(
                f"α of {name} has shape {tuple(values[name].shape)} {where}, but the layer has {layer.module.out_features} rows"
            )
        if not bool(torch.isfinite(values[name]).all()):
            raise ValueError(f"α of {name} holds NaN or infinity {where}; take an earlier one")


def _check_scalable(name: str, layer: BaseLayer) -> None:
    """Raise ValueError where α on this layer would mean nothing, or would do nothing."""
    if layer.module.weight.requires_grad:
        raise ValueError(
            f"{name} has no frozen weight: its weight is trained itself, which can scale rows already; freeze it with "
            "requires_grad_(False), or leave it out of targets"
        )
    if isinstance(layer.module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"{name} is the out_proj of nn.MultiheadAttention, which reads its weight and never calls it; leave it out of targets"
        )
    if any(isinstance(hook, _Scaling) for hook in layer.module._forward_hooks.values()):
        raise ValueError(f"{name} is scaled by a RowRescale already; remove or merge that one first")
    if getattr(layer.owner, "lora_variant", None) or any(getattr(layer.owner, "use_dora", {}).values()):
        raise ValueError(
            f"{name} has a DoRA adapter or another variant of LoRA, which computes with the base weight itself and would miss "
            "its scale; use plain LoRA"
        )


def _check_mergeable(model: nn.Module, name: str, layer: BaseLayer) -> None:
    weight = layer.module.weight
    if type(layer.module) is not nn.Linear or not weight.is_floating_point() or type(weight) is not nn.Parameter:
        raise TypeError(
            f"cannot merge α into {name}: its weight is {'a ' + type(layer.module).__name__} of {weight.dtype} "
            f"({type(weight).__name__}), which cannot hold the product. Keep α in a file of its own (save), or dequantize the "
            "base and attach α to that (from_file)"
        )
    if weight.is_meta:
        raise TypeError(
            f"cannot merge α into {name}: its weight is on the meta device and has no values; load the weights first"
        )
    users = [m for m in model.modules() if any(p is weight for p in m._parameters.values())]
    if len(users) > 1:
        other = next(m for m in users if m is not layer.module)
        raise ValueError(
            f"cannot merge α into {name}: a {type(other).__name__} has the same weight and would be scaled too; untie them first"
        )
    if getattr(layer.owner, "merged", False):
        raise ValueError(
            f"cannot merge α into {name}: PEFT has merged an adapter into the weight, which would be scaled too; call "
            "unmerge_adapter() first, and merge α before the adapter"
        )


def _ones(layer: nn.Linear) -> nn.Parameter:
    weight = layer.weight
    dtype = core_dtype(weight.dtype) if weight.is_floating_point() else torch.float32
    device = torch.device("cpu") if weight.is_meta else weight.device
    return nn.Parameter(torch.ones(layer.out_features, dtype=dtype, device=device), requires_grad=False)


def _made(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], alphas: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of α.

    Raises:
        ValueError: `make` makes none, or one that cannot train exactly the α.
    """
    optimizer = make(list(alphas.values())) if callable(make) else make
    if not callable(make) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer {'made' if callable(make) else 'is'} a {type(optimizer).__name__}; give a function that makes a torch "
            "optimizer from the parameters, such as lambda alphas: torch.optim.AdamW(alphas, lr=1e-2)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss again and again in one step, on one mini-batch; take another optimizer"
        )
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if sorted(held) != sorted(id(alpha) for alpha in alphas.values()):
        raise ValueError(
            f"the optimizer of α holds {len(held)} parameters that are not exactly the {len(alphas)} it was given; make it "
            "from these alone"
        )
    return optimizer


def _loss_of(loss_fn: Callable[[], Tensor]) -> Tensor:
    if not callable(loss_fn):
        raise TypeError(
            f"step takes a function that draws a mini-batch and returns its loss, got a {type(loss_fn).__name__}; it is called "
            "only when α steps: rescale.step(lambda: loss_of(next(batches)))"
        )
    loss = loss_fn()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(
            f"the function that step was given returned {what}; it has to return the loss, a tensor of one number"
        )
    return loss


def _average(alphas: Iterable[nn.Parameter]) -> None:
    """The mean over the ranks of each gradient, and None for an α that has none on any rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for alpha in alphas:
        grad = torch.zeros_like(alpha) if alpha.grad is None else alpha.grad
        # the last entry tells whether there is a gradient
        row = torch.cat([grad, grad.new_full((1,), float(alpha.grad is not None))])
        dist.all_reduce(row)
        alpha.grad = None if float(row[-1]) == 0 else row[:-1] / dist.get_world_size()
