"""A plan as text."""

from collections.abc import Mapping

from longtrain.dry_run import TERMS
from longtrain.planning.planner import Change, Plan

GIB = 2**30


def report(plan: Plan) -> str:
    """Memory by term, work, links and time of a plan, in lines."""
    data, sequence = plan.shape.degrees
    recipe, device, times = plan.recipe, plan.devices.device, plan.times
    lines = [
        f"{recipe.recipe} on {plan.devices} ({device.memory / GIB:.1f} GiB each): data {data} x sequence {sequence}, "
        f"T = {recipe.data.length:,}, {plan.shape.tokens:,} tokens a device, {_weights(plan.shape.weights)} "
        f"weights, recompute {recipe.memory.recompute}, layout {recipe.parallel.layout}",
        "",
        table(plan.memory.terms),
        _row("margin", plan.margin),
        _row("in all", plan.needed),
        f"fullest moment: {plan.memory.moment}",
        f"while the model is made, in float32: {plan.building / GIB:.1f} GiB",
    ]
    if plan.memory.host:
        lines.append(f"on the host, for each device: {plan.memory.host / GIB:.1f} GiB")
    if plan.uncounted:
        lines.append(f"not counted, see a dry run: {', '.join(plan.uncounted)} of {recipe.deepspeed.config}")
    flops = plan.shape.model_flops
    lines += [
        "",
        f"work of a step       {flops:.3g} FLOP, of which attention and scans "
        f"{3 * plan.shape.step_tokens * sum(plan.shape.mixing) / flops:.0%}",
        f"links, each device   {times.inner_bytes / GIB:.3g} GiB a step inside nodes, "
        f"{times.outer_bytes / GIB:.3g} GiB between nodes",
        f"step time            {_seconds(times.step)} (estimated): products {_seconds(times.products)}, attention and "
        f"scans {_seconds(times.mixing)}, messages not hidden {_seconds(times.exposed)}",
        f"speed                {plan.tokens_per_second:,.0f} tokens/s a device, {plan.utilization:.0%} of peak",
        f"what binds           {times.limit}",
    ]
    return "\n".join(lines)


def verdict(plan: Plan, fitting: list[Change], best: Change | None) -> str:
    """Whether it fits; if so what would help most, if not what would make it fit."""
    if plan.fits:
        left = -plan.over / GIB
        helps = "no single change known here makes it faster"
        if best is not None:
            ratio = best.plan.tokens_per_second / plan.tokens_per_second
            helps = f"what would help most: {best} ({ratio:.2f} x the tokens/s, {best.plan.needed / GIB:.1f} GiB)"
        return f"it fits, {left:.1f} GiB are left; {helps}"
    missing = [f"{plan.over / GIB:.1f} GiB on a device"] if plan.over > 0 else []
    missing += [f"{plan.host_over / GIB:.1f} GiB on a node's host"] if plan.host_over > 0 else []
    lines = [f"it does not fit: {' and '.join(missing)} are missing"]
    if not fitting:
        lines.append("no one or two changes known here make it fit: more devices, a shorter data.length or less width")
    for change in fitting:
        lines.append(
            f"  it would with {change}: {change.plan.needed / GIB:.1f} GiB, "
            f"{change.plan.tokens_per_second:,.0f} tokens/s a device"
        )
    return "\n".join(lines)


def table(terms: Mapping[str, float]) -> str:
    """GiB by term, the total last."""
    rows = [_row(term, terms[term]) for term in TERMS]
    return "\n".join([*rows, _row("tensors", sum(terms[term] for term in TERMS))])


def _row(name: str, size: float) -> str:
    return f"{name:<20} {size / GIB:>9.3f} GiB"


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


def _weights(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e8 else f"{count:,}"
