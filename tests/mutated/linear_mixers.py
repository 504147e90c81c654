"""Mutations of linear mixers and convolutions over ranks."""

from tests.mutated.mutation import Mutation

CONV = "tests/parallel/test_conv1d.py::"
EQUALS = f"{CONV}test_equals_one_device[3]"
ROUNDED = f"{CONV}test_every_dtype_loses_nothing_over_ranks[contiguous-dtype0]"
PLAN = "tests/parallel/test_halo.py::test_the_plan_takes_every_token_from_its_holder"
SCAN = "tests/parallel/test_linear.py::"
RECURRENCE, FEWER = f"{SCAN}test_equals_the_recurrence[3]", f"{SCAN}test_equals_the_recurrence[2]"
MIXERS, ENGINE = "parallel/linear/mixers.py", "parallel/linear/engine.py"
RUNS, GATHER = "parallel/scan.py", "parallel/linear/allgather.py"
SCATTER, CHAIN, ULYSSES = (f"parallel/linear/{name}.py" for name in ("alltoall", "chain", "ulysses"))
STRATEGIES = "tests/parallel/test_linear_strategies.py::"
LOCAL = tuple(
    f"tests/parallel/test_linear_local.py::test_ranks_compute_while_messages_travel_and_the_numbers_are_the_same[{mixer}]"
    for mixer in ("linear", "delta", "slot")
)
EVERY_STRATEGY = f"{SCAN}test_every_strategy_is_the_recurrence"
CONVOLVE, HALO = "parallel/conv1d.py", "parallel/halo.py"

PAPER = "tests/layers/test_mixers.py::test_is_the_papers_loop_on_any_number_of_ranks[3-{}-0]"
LINEAR = "        return _OneStateForward(run, decays=True)\n"
DELTA = "        return _OneStateForward(run(*tensors, offsets, scale=scale), decays=False)\n"
FORMS = {
    "linear-without-decay": (LINEAR, "log_decay is None", ()),
    "linear-fixed-decay": (LINEAR, "log_decay is not None and log_decay.ndim == 1", ("lightning", "retention")),
    "linear-token-decay": (LINEAR, "log_decay is not None and log_decay.ndim == 3", ("mamba2",)),
    "linear-channel-decay": (LINEAR, "log_decay is not None and log_decay.ndim == 4", ("gla",)),
    "delta-rule-plain": (DELTA, "tensors[4] is None", ("deltanet",)),
    "delta-rule-gated": (DELTA, "tensors[4] is not None and tensors[4].ndim == 3", ("gated_deltanet",)),
    "delta-rule-channel": (DELTA, "tensors[4] is not None and tensors[4].ndim == 4", ("kimi_delta",)),
    "slots": ("        log_transition, keys, values = self._run.summaries()\n", "", ("gsa",)),
}
"""Each form of a recurrence: where its runs are summed up, how it is told from others, the mixers that have it."""


def _zeroed(form: str, test: str, name: str) -> Mutation:
    """What enters a rank's run does not leave it, in this form alone: tests of the others cannot see it."""
    old, told, _ = FORMS[form]
    if old == LINEAR:
        new = (
            f"        if {told}:\n"
            "            whole = run.summaries\n"
            "            run.summaries = lambda: (lambda log, state: (log - torch.inf, state))(*whole())\n"
        ) + old
    elif old == DELTA:
        new = (
            "        made = run(*tensors, offsets, scale=scale)\n"
            f"        if {told}:\n"
            "            whole = made.summaries\n"
            "            made.summaries = lambda: (lambda transition, state: (0 * transition, state))(*whole())\n"
            "        return _OneStateForward(made, decays=False)\n"
        )
    else:
        new = old + "        log_transition = log_transition - torch.inf\n"
    return Mutation(name, MIXERS, old, new, (test,))


MUTATIONS = (
    # Convolutions: the halo, and the way back.
    Mutation("rank-halo-dropped", CONVOLVE, "out[:, start:stop] = part", "pass", (EQUALS,)),
    Mutation("rank-halo-gradient-dropped", CONVOLVE, "total[:, first - start :] += gradient", "pass", (EQUALS,)),
    Mutation(
        "rank-halo-gradient-rounded",
        CONVOLVE,
        "total[:, first - start :] += gradient",
        "total[:, first - start :] += gradient.to(x.dtype)",
        (ROUNDED,),
    ),
    Mutation(
        "tail-rounded-before-the-sum",
        CONVOLVE,
        "total = part[:, part.shape[1] - (stop - start) :]",
        "total = dx[:, start:stop].to(state)",
        (ROUNDED,),
    ),
    Mutation(
        "tail-without-what-it-sees", CONVOLVE, "begin = max(min(sent) - reach, start)", "begin = min(sent)", (EQUALS,)
    ),
    Mutation(
        "weights-do-not-see-the-halo",
        CONVOLVE,
        "whole[:, segment] = halo[:, n]",
        "whole[:, segment] = 0",
        (EQUALS,),
    ),
    Mutation(
        "halo-of-the-document-before",
        HALO,
        "begin = max(run.start - reach, starts[bisect_right(starts, run.start) - 1])",
        "begin = max(run.start - reach, 0)",
        (PLAN,),
    ),
    Mutation("halo-of-one-run-only", HALO, "        if start == begin:\n            break", "        break", (PLAN,)),
    Mutation("halo-rows-from-the-start", HALO, "row=reach - (reader.start - start)", "row=start - begin", (PLAN,)),
    Mutation(
        "halo-asked-for-again",
        CONVOLVE,
        "halo = held[0] if held else HaloExchange(x, plan.halo, group).wait()",
        "halo = HaloExchange(x, plan.halo, group).wait()",
        (f"{CONV}test_only_the_halo_travels_and_only_to_neighbours",),
    ),
    Mutation(
        "convolution-s-handshake-dropped",
        CONVOLVE,
        "    agree(spread, _signature(x, weight, bias, spread, stated), device=x.device)",
        "    pass",
        (f"{CONV}test_ranks_that_disagree_are_all_told",),
    ),
    # Scans: what a run sums up to, what it lets pass, and to whom.
    *(_zeroed(form, RECURRENCE, f"{form}-transition-zeroed") for form in FORMS),
    *(
        _zeroed(form, PAPER.format(mixer), f"{mixer}-transition-zeroed")
        for form, (_, _, mixers) in FORMS.items()
        for mixer in mixers
    ),
    Mutation(
        "delta-rule-transition-not-transposed",
        MIXERS,
        "transition.transpose(-1, -2) if backward else transition",
        "transition",
        (RECURRENCE,),
    ),
    Mutation("runs-in-the-order-of-ranks", RUNS, "sorted(runs, key=lambda run: run.start)", "runs", (FEWER,)),
    Mutation(
        "states-stop-at-ranks", RUNS, "own + through(run, received) if run.passes", "own if run.passes", (RECURRENCE,)
    ),
    Mutation("states-pass-document-ends", RUNS, "after == bisect_left(starts, stop)", "True", (RECURRENCE,)),
    Mutation(
        "documents-continue-what-came-before",
        RUNS,
        "starts[after - 1] != start, after",
        "start > 0, after",
        (RECURRENCE,),
    ),
    Mutation(
        "first-segment-summed-up",
        ENGINE,
        "(_of_runs(plan, x, plan.last) for x in run.summaries())",
        "(_of_runs(plan, x, plan.first) for x in run.summaries())",
        (RECURRENCE,),
    ),
    Mutation(
        "gradients-enter-the-first-segment",
        ENGINE,
        "run.finish(before, _to_segments(plan, leaving, plan.last), need_state=False)",
        "run.finish(before, _to_segments(plan, leaving, plan.first), need_state=False)",
        (RECURRENCE,),
    ),
    # Exchanges: all-to-all, chain, Ulysses.
    Mutation(
        "shares-begin-at-their-heads",
        SCATTER,
        "begin = share.start - share.first * columns",
        "begin = 0",
        (RECURRENCE, EVERY_STRATEGY),
    ),
    Mutation(
        "scattered-gradients-of-one-rank",
        SCATTER,
        "summaries[:, -1].sum(0)",
        "summaries[0, -1]",
        (RECURRENCE, EVERY_STRATEGY),
    ),
    Mutation(
        "chain-crosses-documents",
        CHAIN,
        "return (other if one.start < other.start else one).continues",
        "return True",
        (f"{STRATEGIES}test_a_chain_sends_states_only_within_documents",),
    ),
    Mutation(
        "chain-keeps-no-gradient-of-the-others",
        CHAIN,
        "return torch.stack(parts).sum(0)",
        "return x",
        (EVERY_STRATEGY,),
    ),
    Mutation(
        "ulysses-heads-of-the-first-rank",
        ULYSSES,
        "initial[:, exchange.own_heads]",
        "initial[:, : inner.sizes.heads]",
        (EVERY_STRATEGY,),
    ),
    Mutation("last-state-gradient-of-one-rank", GATHER, "received[:, -1].sum(0)", "received[0, -1]", (RECURRENCE,)),
    # The exchanges of summaries.
    Mutation(
        "share-with-another-run-s-transition",
        SCATTER,
        "carry(transitions[run.rank, run.slot], x)",
        "carry(transitions[0, run.slot], x)",
        (RECURRENCE,),
    ),
    Mutation(
        "chain-hands-on-its-own-state-only",
        CHAIN,
        "handed_on(run, state[run.slot], incoming, lambda run, x: carry(transition[run.slot], x))",
        "state[run.slot]",
        (RECURRENCE,),
    ),
    Mutation(
        "chain-transition-not-transposed",
        CHAIN,
        "carry(kept[run.slot], x, backward=True)",
        "carry(kept[run.slot], x)",
        (RECURRENCE, FEWER),
    ),
    Mutation(
        "decay-gradients-of-other-heads",
        ULYSSES,
        "gradients[-1][exchange.own_heads] = found[-1]",
        "gradients[-1][: len(found[-1])] = found[-1]",
        (FEWER,),
    ),
    Mutation(
        "state-s-gradient-not-exchanged-for-heads",
        ULYSSES,
        "dstate = reduce_scatter_parts(dstate.transpose(0, 1), shares, call.shard.group).transpose(0, 1)",
        "dstate = world * dstate[:, exchange.own_heads]",
        (FEWER,),
    ),
    # What is computed while messages travel.
    *(
        Mutation(
            f"nothing-local-before-the-states-are-there-{test[:-1].rpartition('[')[2]}",
            ENGINE,
            "exchange.states(transition, state, initial, call, run.local)",
            "exchange.states(transition, state, initial, call, lambda: None)",
            (test,),
        )
        for test in LOCAL
    ),
    *(
        Mutation(
            f"nothing-local-before-the-gradients-are-there-{test[:-1].rpartition('[')[2]}",
            ENGINE,
            "local = partial(run.local, before)",
            "local = partial(len, ())",
            (test,),
        )
        for test in LOCAL
    ),
    Mutation(
        "keys-of-slots-not-read-while-their-gradient-travels",
        MIXERS,
        "            self._run.local_keys(keys)\n",
        "            pass\n",
        (LOCAL[2],),
    ),
    Mutation(
        "local-forgets-what-entered",
        ENGINE,
        "local = partial(run.local, before)",
        "local = partial(run.local, None)",
        (RECURRENCE,),
    ),
)
