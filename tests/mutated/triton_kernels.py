"""Mutations of the Triton kernels, found by tests in Triton's interpreter."""

from tests.mutated.mutation import Mutation

FOLDER = "tests/kernels/interpreted/test_"
LINEAR = FOLDER + "linear_attention.py::test_triton_is_the_reference"
SLOW = {decay: f"{LINEAR}[{decay}-slow-heads0-widths0-documents0]" for decay in ("none", "head", "token", "channel")}
REACH = FOLDER + "linear_attention.py::test_nan_and_inf_reach_who_sees_them"
DELTA = FOLDER + "gated_delta_rule.py::"
PIECES = f"{DELTA}test_two_pieces_joined_by_their_summaries_are_one[token-40]"
CHUNKED = f"{DELTA}test_several_blocks_of_keys_and_values"
SLOTS = FOLDER + "gated_slot_attention.py::test_stages_are_those_of_the_torch_path"
CONV = FOLDER + "causal_conv1d.py::"
CHANNELS = f"{CONV}test_several_blocks_of_channels"
LOSS = FOLDER + "linear_cross_entropy.py::test_triton_is_the_reference"

SWEEP, BACKWARD = "kernels/linear_attention/triton_forward.py", "kernels/linear_attention/triton_backward.py"
PER_CHANNEL = "kernels/linear_attention/triton_channels.py"
STATES, PREPARE = "kernels/gated_delta_rule/triton_states.py", "kernels/gated_delta_rule/triton_prepare.py"
SLOT_KERNELS, CONVOLVE = "kernels/gated_slot_attention/triton_kernels.py", "kernels/causal_conv1d/triton_kernels.py"
SOFTMAX = "kernels/linear_cross_entropy/triton_softmax.py"

MUTATIONS = (
    # Linear attention.
    Mutation(
        "mask-of-a-triton-chunk-dropped",
        SWEEP,
        'tl.exp(tl.where(distance >= 0, between, float("-inf")))',
        "tl.exp(between)",
        (SLOW["head"],),
    ),
    Mutation(
        "ragged-tail-of-a-triton-chunk",
        SWEEP,
        "powers((tokens - 1 - steps).to(tl.float32), g)",
        "powers((C - 1 - steps).to(tl.float32), g)",
        (SLOW["head"],),
    ),
    Mutation(
        "transition-of-a-triton-part-zeroed",
        SWEEP,
        "log = tl.load(logs + row + 0 * k, mask=known, other=0)",
        'log = tl.load(logs + row + 0 * k, mask=known, other=0) + float("-inf")',
        (SLOW["head"],),
    ),
    Mutation(
        "transition-of-a-triton-part-zeroed-by-channel",
        SWEEP,
        "log = tl.load(logs + row * K + k, mask=known, other=0)",
        'log = tl.load(logs + row * K + k, mask=known, other=0) + float("-inf")',
        (SLOW["channel"],),
    ),
    Mutation(
        "parts-carried-in-the-wrong-order",
        SWEEP,
        "            part = end - 1 - n\n",
        "            part = begin + n\n",
        (SLOW["head"],),
    ),
    Mutation(
        "accumulator-rounded",
        SWEEP,
        "acc=state, input_precision=PRECISION)\n        store_rows(",
        "acc=state.to(tl.bfloat16).to(tl.float32), input_precision=PRECISION)\n        store_rows(",
        (SLOW["none"],),
    ),
    Mutation(
        "pairs-around-a-token-one-off",
        BACKWARD,
        "own += tl.cumsum(r, 0, reverse=True) + tl.cumsum(w_before, 0)",
        "own += tl.cumsum(r, 0, reverse=True) + tl.cumsum(w, 0)",
        (SLOW["token"],),
    ),
    Mutation(
        "own-product-counted-among-pairs",
        SWEEP,
        "return own, tl.where(diagonal, 0.0, score)",
        "return own, score",
        (SLOW["token"],),
    ),
    Mutation(
        "what-is-not-finite-flagged-by-nobody",
        SWEEP,
        "tl.store(flags + program, tl.sum(broken, 0))",
        "tl.store(flags + program, tl.sum(0.0 * tl.zeros_like(broken), 0))",
        (REACH + "[token-0]",),
    ),
    Mutation(
        "nan-among-keys-of-a-channel-reaches-all",
        PER_CHANNEL,
        "writing = finite(tl.where(bit, 0.0, k_rows * decay))",
        "writing = tl.where(bit, 0.0, k_rows * decay)",
        (REACH + "[channel-0]",),
    ),
    Mutation(
        "nan-among-keys-of-a-channel-hidden",
        PER_CHANNEL,
        "dscores += tl.sum(k_rows * 0.0, 1)[None, :].to(TYPE)",
        "dscores += 0.0",
        (REACH + "[channel-0]",),
    ),
    Mutation(
        "diagonal-of-channels-dropped",
        PER_CHANNEL,
        "score += tl.where(steps[:, None] == steps[None, :], diagonal, 0.0)",
        "score += 0.0 * diagonal",
        (SLOW["channel"],),
    ),
    # The delta rule.
    Mutation(
        "delta-chunk-carry-without-decay",
        STATES,
        "state *= tl.load(through + (first_chunk + n) * H + head)\n        if GATE == 2:\n            total = tl.load("
        "through + ((first_chunk + n) * H + head) * K + keys, mask=key_live, other=0.0)\n            state *=",
        "pass\n        if GATE == 2:\n            total = tl.load("
        "through + ((first_chunk + n) * H + head) * K + keys, mask=key_live, other=0.0)\n            state *=",
        (CHUNKED + "[token]",),
    ),
    Mutation(
        "transition-of-a-delta-segment-zeroed",
        STATES,
        "(keys[:, None] == values[None, :]).to(tl.float32)",
        "0.0 * (keys[:, None] == values[None, :]).to(tl.float32)",
        (PIECES,),
    ),
    Mutation(
        "erasing-dropped-in-backward",
        STATES,
        "(-dstored).to(w_block.dtype)",
        "(0.0 * dstored).to(w_block.dtype)",
        (CHUNKED + "[none]",),
    ),
    Mutation(
        "halves-meet-in-the-wrong-order",
        PREPARE,
        "(i // half % 2 == 1)[:, None] & (i // half % 2 == 0)[None, :]",
        "(i // half % 2 == 0)[:, None] & (i // half % 2 == 1)[None, :]",
        (CHUNKED + "[channel]",),
    ),
    Mutation(
        "decay-between-delta-tokens-one-off",
        PREPARE,
        "tl.where(i[:, None] > i[None, :], g[:, None], 0.0)",
        "tl.where(i[:, None] >= i[None, :], g[:, None], 0.0)",
        (CHUNKED + "[token]",),
    ),
    Mutation(
        "nan-reaches-earlier-delta-tokens",
        PREPARE,
        "return i >= tl.min(tl.where(broken, i, C), 0)",
        "return i >= 0 * tl.min(tl.where(broken, i, C), 0)",
        (f"{DELTA}test_nan_and_inf_reach_who_sees_them[token-0]",),
    ),
    Mutation(
        "marked-delta-tokens-left-among-pairs",
        PREPARE,
        "(i[:, None] > i[None, :]) & together, a_sum",
        "(i[:, None] > i[None, :]), a_sum",
        (f"{DELTA}test_nan_and_inf_reach_who_sees_them[token-0]",),
    ),
    # Slots.
    Mutation(
        "slots-written-with-their-own-decay",
        SLOT_KERNELS,
        "rows + 1, tl.minimum(stop, at + C)",
        "rows, tl.minimum(stop, at + C)",
        (SLOTS,),
    ),
    Mutation(
        "slot-scores-without-the-state-s-decay",
        SLOT_KERNELS,
        "other=0) * tl.exp(prefix)",
        "other=0)",
        (SLOTS,),
    ),
    # The convolution.
    Mutation(
        "triton-halo-dropped",
        CONVOLVE,
        "value = tl.where(inside[:, None], value, before.to(tl.float32))",
        "value = tl.where(inside[:, None], value, 0.0)",
        (CHANNELS,),
    ),
    Mutation(
        "triton-halo-counts-ignored",
        CONVOLVE,
        "outside = outside & (ago <= tl.load(counts + segment, mask=alive, other=0))",
        "pass",
        (f"{CONV}test_wide",),
    ),
    Mutation(
        "triton-convolution-reads-other-documents",
        CONVOLVE,
        "inside = alive & (t - k >= start)",
        "inside = alive & (t - k >= 0)",
        (CHANNELS,),
    ),
    Mutation(
        "triton-gradients-of-other-documents",
        CONVOLVE,
        "reads = reads & (tl.load(segment_of + reader, mask=reads, other=-1) == segment)",
        "pass",
        (CHANNELS,),
    ),
    Mutation("triton-halo-gradient-one-off", CONVOLVE, "(position <= r) &", "(position < r) &", (CHANNELS,)),
    # Cross-entropy.
    Mutation("running-total-not-rescaled", SOFTMAX, "total * tl.exp(maximum - shift) +", "total +", (LOSS,)),
    Mutation(
        "target-of-another-block", SOFTMAX, "tl.store(own_of + row, own)", "tl.store(own_of + row, own + 1)", (LOSS,)
    ),
    Mutation("target-s-gradient-dropped", SOFTMAX, "tl.where(column == target, dz - dloss, dz)", "dz", (LOSS,)),
    Mutation("triton-softcap-slope-dropped", SOFTMAX, "dz = slope * tl.where", "dz = tl.where", (LOSS,)),
    # What `local` does while messages travel, and hands to `finish`.
    Mutation(
        "triton-local-states-from-nothing",
        "kernels/linear_attention/triton_impl.py",
        "states = self._pass.entering(initial_state, None, forward=True)",
        "states = self._pass.entering(None, None, forward=True)",
        (FOLDER + "linear_attention.py::test_stages_are_those_of_torch[token]",),
    ),
    Mutation(
        "triton-local-states-of-the-delta-rule-from-nothing",
        "kernels/gated_delta_rule/triton_impl.py",
        "call.carry(self._ready[0], call.by_segment(initial_state), states=self._states)",
        "call.carry(self._ready[0], None, states=self._states)",
        (PIECES,),
    ),
)
