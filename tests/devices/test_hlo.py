"""Matrix products and bytes, counted in the HLO of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsoft.devices.hlo import Work, work_of

TPU = """HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[64,128], p.1: bf16[128,512], p.2: s32[]) -> f32[64,32] {
  %p.0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(1)
  %p.2 = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[128,32]{1,0} dynamic-slice(%p.1, %zero, %p.2), sizes={128,32}
  ROOT %out = f32[64,32]{1,0} convolution(%p.0, %slice), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[64,128], bf16[128,512])) -> (s32[], bf16[64,128]) {
  %state = (s32[]{:T(128)}, bf16[64,128], /*index=2*/bf16[128,512]) parameter(0)
  %at = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %x = bf16[64,128]{1,0} get-tuple-element(%state), index=1
  %w = bf16[128,512]{1,0} get-tuple-element(%state), index=2
  %product = f32[64,32]{1,0:T(8,128)S(1)} fusion(%x, %w, %at), calls=%fused
  %copy-start = (f32[64,32], f32[64,32]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%product)
  %copy-done = f32[64,32]{1,0} copy-done(%copy-start)
  %kept = s32[]{:T(128)S(6)} copy(%at)
  %step = s32[]{:T(128)} constant(STEP)
  %counted = (s32[]{:T(128)}, s32[]) fusion(%step, %kept), calls=%counting
  %after = s32[]{:T(128)} get-tuple-element(%counted), index=0
  ROOT %next = (s32[]{:T(128)}, bf16[64,128]) tuple(%after, %x)
}

%counting (by: s32[], from: s32[]) -> (s32[], s32[]) {
  %by = s32[]{:T(128)} parameter(0)
  %from = s32[]{:T(128)} parameter(1)
  %more = s32[]{:T(128)} add(%from, %by)
  ROOT %both = (s32[]{:T(128)}, s32[]) tuple(%more, %from)
}

%condition (state.1: (s32[], bf16[64,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[64,128]) parameter(0)
  %count = s32[]{:T(128)S(6)} get-tuple-element(%state.1), index=0
  %end = s32[]{:T(128)} constant(END)
  ROOT %less = pred[]{:T(512)S(6)} compare(%count, %end), direction=LT
}

ENTRY %main (x.1: bf16[64,128], w.1: bf16[128,512]) -> f32[] {
  %x.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(1)
  %first = s32[]{:T(128)S(6)} constant(3)
  %room = f32[64,32]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %init = (s32[], bf16[64,128], bf16[128,512]) tuple(%first, %x.1, %w.1)
  %loop = (s32[], bf16[64,128]) while(%init), condition=%condition, body=%body
  ROOT %kernel = f32[] custom-call(%x.1), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000",\
"transcendentals":"7","bytes_accessed":"100"}}}
}
"""

# A slice of an array that is laid out anew, as far as it is needed.
LAID_OUT = """HloModule laid_out

%copied (input: bf16[128,512]) -> bf16[128,512] {
  %input = bf16[128,512]{1,0:T(16,128)(2,1)} parameter(0)
  ROOT %copy = bf16[128,512]{1,0:T(8,128)(2,1)} copy(%input)
}

%sliced (table: bf16[128,512], start: s32[]) -> bf16[128,32] {
  %table = bf16[128,512]{1,0:T(16,128)(2,1)} parameter(0)
  %whole = bf16[128,512]{1,0:T(8,128)(2,1)} fusion(%table), kind=kLoop, calls=%copied
  %zero = s32[] constant(0)
  %start = s32[] parameter(1)
  ROOT %slice = bf16[128,32]{1,0:T(8,128)(2,1)} dynamic-slice(%whole, %zero, %start), \
dynamic_slice_sizes={128,32}
}

ENTRY %main (w: bf16[128,512], at: s32[]) -> bf16[128,32] {
  %w = bf16[128,512]{1,0:T(16,128)(2,1)} parameter(0)
  %at = s32[] parameter(1)
  ROOT %part = bf16[128,32]{1,0:T(8,128)(2,1)} fusion(%w, %at), kind=kLoop, \
calls=%sliced
}
"""


def work(function, *arrays):
    found = work_of(jax.jit(function).lower(*arrays).compile().as_text() or "")
    assert found is not None
    return found


def test_loops_count_as_often_as_they_run():
    x, w = jnp.ones((3, 8)), jnp.ones((8, 8))
    loop = work(lambda x: lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x), x)
    assert loop.dot_flops == 5 * 2 * 3 * 8 * 8 and not loop.is_least
    # Nothing that the compiler could know how often.
    until = work(lambda x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x), x)
    assert until.dot_flops == 2 * 3 * 8 * 8 and until.is_least


def test_slices_and_updates_in_place_move_no_whole_array():
    table = np.ones((4096, 256), np.float32)

    def total(table):
        def step(index, sums):
            rows = lax.dynamic_slice_in_dim(table, index * 64, 64)
            return lax.dynamic_update_slice_in_dim(sums, rows * 2, index * 64, 0)

        return lax.fori_loop(0, 64, step, jnp.zeros_like(table))

    moved = work(total, table)
    assert moved.dot_flops == 0
    # Read once, written once, and the zeros before; not 64 times.
    assert 2 * table.nbytes <= moved.accessed <= 8 * table.nbytes


def test_of_branches_the_largest_counts():
    x = jnp.ones((64, 64))

    def either(which, x):
        return lax.switch(which, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

    assert work(either, 0, x).dot_flops == 2 * 2 * 64**3

    # One multiplies, the other reads: the most of each, whichever runs.
    table = jnp.ones((512, 64, 64))
    found = work(
        lambda f, x, t: lax.cond(f, lambda: x @ x, lambda: t.sum(0)), True, x, table
    )
    assert found.dot_flops == 2 * 64**3 and found.accessed >= table.nbytes


@pytest.mark.parametrize("end, step", [(3, 1), (19, 1), (19, 4), (20, 4), (3, 2)])
def test_what_compilers_for_tpus_write(end, step):
    runs = -(-(end - 3) // step)
    found = work_of(TPU.replace("END", str(end)).replace("STEP", str(step)))
    # States, a slice of the kernel, and the copy out of the chip's own memory.
    moved = 2 * 64 * 128 + 2 * 128 * 32 + 4 * 64 * 32
    loop = 2 * 64 * 128 * 32 * runs
    assert found is not None
    assert found.dot_flops == loop + 1000
    # The counter's loop reads and writes some scalars, where they are not on the chip.
    assert 0 <= found.accessed - (moved * runs + 100) <= 40 * (runs + 1)
    assert not found.is_least


@pytest.mark.parametrize(
    "given, other",
    [
        ("add(%from, %by)", "add(%from, %from)"),
        ("add(%from, %by)", "multiply(%from, %by)"),
        ("get-tuple-element(%counted), index=0", "negate(%kept)"),
        ("constant(STEP)", "constant(-1)"),
        ("constant(STEP)", "constant(0.5)"),
        ("constant(END)", "constant(inf)"),
        ("constant(3)", "constant(2.5)"),
    ],
)
def test_a_loop_that_does_not_count_up_by_a_number_counts_once(given, other):
    text = TPU.replace(given, other).replace("END", "19").replace("STEP", "1")
    found = work_of(text)
    assert found is not None and found.is_least
    assert found.dot_flops == 2 * 64 * 128 * 32 + 1000


def test_of_what_is_laid_out_anew_only_what_is_needed_moves():
    assert work_of(LAID_OUT) == Work(0, 2 * (2 * 128 * 32) + 4)


def test_a_kernel_that_does_not_tell():
    text = (
        TPU.replace('"cost_estimate"', '"other"')
        .replace("END", "3")
        .replace("STEP", "1")
    )
    assert work_of(text) == Work(0, 2 * 64 * 128 + 4, is_least=True, is_untold=True)


def test_what_is_no_program():
    assert work_of("") is None and work_of("ModuleOp {\n}\n") is None
