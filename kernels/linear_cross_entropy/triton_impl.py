"""Cross-entropy of a linear head on a GPU: large matrix products by the vendor's library, Triton for what lies between.

The products are nearly all of the work, and no kernel of ours multiplies faster; see `loop` for the order of things.
"""

from torch import Tensor

from longtrain.kernels import launching
from longtrain.kernels.launching import launch
from longtrain.kernels.linear_cross_entropy import configs, loop, triton_softmax
from longtrain.kernels.linear_cross_entropy.loop import Options


class TritonSteps:
    """`loop.Steps`."""

    def sum_up(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        first: int,
        softcap: float | None,
        maximum: Tensor,
        total: Tensor,
        own: Tensor,
    ) -> None:
        rows, width = logits.shape
        launch(
            triton_softmax.sum_up,
            (rows,),
            logits,
            targets,
            maximum,
            total,
            own,
            logits.stride(0),
            width,
            first,
            softcap or 0.0,
            config=configs.config(launching.architecture(logits.device), "sum_up"),
            CAPPED=softcap is not None,
        )

    def differentiate(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        first: int,
        softcap: float | None,
        lse: Tensor,
        scale: Tensor,
        dlosses: Tensor,
        out: Tensor,
    ) -> None:
        rows, width = logits.shape
        config = configs.config(launching.architecture(logits.device), "differentiate")
        launch(
            triton_softmax.differentiate,
            (rows, -(-width // int(config.constants["BLOCK"]))),
            logits,
            out,
            targets,
            lse,
            scale,
            dlosses,
            logits.stride(0),
            width,
            first,
            softcap or 0.0,
            config=config,
            CAPPED=softcap is not None,
        )


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """As `loop.forward`."""
    sizes = configs.tile_sizes(hidden.shape[1])
    return loop.forward(hidden, weight, targets, options, TritonSteps(), sizes)


def backward(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    options: Options,
    *,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As `loop.backward`."""
    return loop.backward(
        dlosses,
        hidden,
        weight,
        targets,
        lse,
        options,
        TritonSteps(),
        configs.tile_sizes(hidden.shape[1]),
        need_hidden=need_hidden,
        need_weight=need_weight,
    )
