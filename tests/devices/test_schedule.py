"""Bundles of a TPU's schedule: how they are read, and how often they run.

The texts are made up, in the form in which libtpu writes them.
"""

import dataclasses
import json
import re

import pytest

from jaxsoft.devices import control
from jaxsoft.devices.bundles import FLAGS, UNITS, codes
from jaxsoft.devices.chips import CHIPS, least_time
from jaxsoft.devices.hlo import runs_of
from jaxsoft.devices.measuring import Ran
from jaxsoft.devices.schedule import Schedule, schedule_of

DELAY = 4
# Five steps of an outer loop; the first and the last jump over an inner one of TRIPS,
# whose own first step is left by nothing. Addresses 3 to 6, 11 to 14 and 17 to 20 are
# behind branches.
NESTED = """= control target key start
LB: loop body
= control target key end

     0   :  { %s10_s1 = smov 0 /* cssa */ } /* Start region 9 :: End region 9 */
   0x1 LB: > { %p1_p0 = scmp.ge.s32.totalorder %s11_s1, 1  ;;  %s11_s1 = sphi %s10_s1, \
%s12_s1 /* phi copy :: iteration index, stage = 0 */ } /* Start region 1 */
   0x2   : > { %p2_p1 = scmp.lt.s32.totalorder %s11_s1, 4  ;;  %7 = dma.hbm_to_vmem \
[thread:$0]  (!%p1_p0), /*hbm=*/%s90, /*size=*/163840 /*
window_bounds: (4, 256)
hlo: nested
 */ }
   0x3   : > { %p3_p2 = pnand %p1_p0, %p2_p1 }
   0x4   : > { %40 = sbr.rel (%p3_p2) target = $region3 }
   0x5   :  {}
   0x6   :  {}
   0x7   : > { %s20_s5 = smov (!%p3_p2), 4294967292 /* minus four */ }
   0x8   : > { %41 = sst [smem:[#allocation2_spill]] %s11_s1 } /* End region 2 */
   0x9 LB: >> { %s21_s5 = sadd.s32 1, %s22_s5  ;;  %s22_s5 = sphi %s20_s5, %s21_s5 \
 ;;  %v3_v1 = vadd.f32 1.0, %v2_v0 } /* Start region 5 */
   0xa   : >> { %p4_p3 = scmp.ge.s32.totalorder %s21_s5, TRIPS /* loop exit test */ }
   0xb   : > { %42 = sbr.rel (!%p4_p3) target = $region5 }
   0xc   : >> { %v4_v1 = vadd.f32 1.0, %v3_v1 }
   0xd   :  {}
   0xe   :  {}
   0xf   : > { %s13_s1 = sld [smem:[#allocation2_spill]] } /* End region 5 */
  0x10 PF: > { %s12_s1 = sadd.s32 1, %s11_s1 } /* Start/End empty region 3 */
  0x11   : > { %p5_p4 = scmp.ge.s32.totalorder %s12_s1, 5 /* loop exit test */ }
  0x12   :  { %43 = sbr.rel (!%p5_p4) target = $region1 }
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  {} /* End region 1 */
  0x17   :  {} /* exit bundle: %nested = fusion(%x), calls=%sum */
"""
BUNDLES = 0x18
# What runs always, and what is in each iteration of the loops.
OUTER, INNER, JUMPED, STEPS, TRIPS = 2, 7, 1, 5, 7
# A loop that ends by a number that the program is given.
GIVEN = """
     0   :  { %s1_s1 = smov 0 /* copy for cssa */  ;;  %s9_s9 = sld [smem:[%s7_s7]] }
   0x1 LB: > { %s2_s1 = sphi %s1_s1, %s3_s1  ;;  %s3_s1 = sadd.s32 1, %s2_s1 } \
/* Start region 4 */
   0x2   : > { %p1_p1 = scmp.ge.s32.totalorder %s3_s1, %s9_s9 /* loop exit test */ }
   0x3   : > { %5 = sbr.rel (!%p1_p1) target = $region4 }
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  {} /* End region 4 */
   0x8   :  { %6 = sbr.rel (%p8_p8) target = $region6 }
   0x9   :  {}
   0xa   :  {}
   0xb   :  {}
   0xc   :  {}
   0xd   :  { %v1_v1 = vadd.f32 1.0, %v1_v1 }
   0xe   :  {} /* Start/End empty region 6 */
"""
CAPACITY = (2, 2, 4, 2, 1, 3, 3, 2, 2, 2)
HLO = """HloModule jit_f, is_scheduled=true

%sum (x.1: f32[8]) -> f32[8] {
  ROOT %x.1 = f32[8]{0} parameter(0)
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]) parameter(0)
  %nested = f32[8]{0} fusion(%state), kind=kLoop, calls=%sum
  ROOT %next = (s32[], f32[8]) tuple(%state, %nested)
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]) parameter(0)
  ROOT %given = pred[] custom-call(%state.1), custom_call_target="less"
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %again = f32[8]{0} fusion(%x), kind=kLoop, calls=%sum
  %given.1 = f32[8]{0} fusion(%again), kind=kLoop, calls=%sum
  ROOT %loop = (s32[], f32[8]) while(%x), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def write(folder, name, text, taken=lambda place: 0):
    """Writes what libtpu would; `taken` are the vector unit's slots of each bundle."""
    stem = f"17960-{name}-0"
    (folder / f"{stem}2-final_bundles.txt").write_text(text)
    count = len(re.findall(r"^ *(?:0x[0-9a-f]+|0) .*: ", text, re.MULTILINE))
    valu = UNITS.index("valu")
    rows = [[taken(p) if u == valu else 0 for u in range(10)] for p in range(count)]
    lines = [" ".join(map(str, row)) for row in (CAPACITY, *rows)]
    (folder / f"{stem}0-final_hlo-static-per-bundle-utilization.txt").write_text(
        "\n".join(["== CAPACTIY:", "MXU, XLU", *lines])
    )
    (folder / f"{stem}1-schedule-analysis_final_bundles.txt").write_text("none")
    return count


def read(folder, text, delay=DELAY, **options):
    write(folder, "nested", text, **options)
    (code,) = codes(folder)
    return code, control.count(code.bundles, delay)


@pytest.mark.parametrize("trips", [1, 3, 1000])
def test_nested_loops_multiply_and_what_is_jumped_over_does_not_run(tmp_path, trips):
    code, counts = read(tmp_path, NESTED.replace("TRIPS", str(trips)))
    assert len(code.bundles) == BUNDLES
    outer, inner = counts.loops
    # The inner one counts up from minus four, in steps 1, 2 and 3 of the outer one.
    assert (outer.trips, inner.trips) == (5, 3 * (trips + 4))
    assert not counts.is_least
    assert counts.times[0] == counts.times[-1] == 1
    assert {counts.times[place] for place in (1, 8, 0x10, 0x16)} == {5}
    # What is behind the inner branch runs as often as what is before it.
    assert set(counts.times[9:0x10]) == {3 * (trips + 4)}


def test_bundles_behind_a_branch_are_the_chips(tmp_path):
    _, counts = read(tmp_path, NESTED.replace("TRIPS", "1"), delay=2)
    # The number that the inner loop begins with is written too late, by a jump.
    assert counts.times[7] == 3 and counts.times[6] == 5
    assert {name: chip.branch_delay for name, chip in CHIPS.items()} == {
        "v5e": 4,
        "v6e": 4,
        "7x": 6,
        "h100": 0,
        "b200": 0,
    }


def test_no_bundle_of_the_next_region_runs_before_a_jump(tmp_path):
    # A 7x's compiler writes an empty bundle for several behind a branch.
    text = NESTED.replace("TRIPS", "3")
    shorter = text.replace("minus four */ }", "minus four */ } /* Start region 4 */")
    assert shorter != text
    _, counts = read(tmp_path, shorter, delay=6)
    assert [loop.trips for loop in counts.loops] == [5, 3 * 7]
    assert counts.times[4:9] == (5, 5, 5, 3, 3)


def test_what_depends_on_a_given_number_is_not_guessed(tmp_path):
    _, counts = read(tmp_path, GIVEN)
    (loop,) = counts.loops
    assert loop.trips is None and counts.is_least
    # Once through the loop, and over what may be jumped over.
    assert counts.times == (*[1] * 13, 0, 1)


@pytest.mark.parametrize(
    "known, unknown",
    [
        # The outer loop repeats, the inner one is jumped over, the outer one is left.
        ("%43 = sbr.rel (!%p5_p4)", "%43 = sbr.rel (!%p9_p9)"),
        ("%40 = sbr.rel (%p3_p2)", "%40 = sbr.rel (%p9_p9)"),
        ("0xc   : >> {", "0xc   : >> { %44 = sbr.rel (%p9_p9) target = $region8  ;;"),
    ],
)
def test_loops_in_and_around_which_something_unknown_decides(tmp_path, known, unknown):
    text = NESTED.replace("TRIPS", "3").replace("/* exit", "/* Start region 8 */ /*")
    changed = text.replace(known, unknown)
    assert changed != text
    _, counts = read(tmp_path, changed)
    outer, inner = counts.loops
    assert counts.is_least and inner.trips is None
    assert outer.trips == (5 if "%40" in known else None)


@pytest.mark.parametrize(
    "given",
    [
        "smov [#allocation3]",
        "sld [smem:[%s7_s7]]",
        "sld [smem:[#allocation4]]",
        "scalar_lea.smem [#allocation3], %s1_s1",
    ],
)
def test_addresses_and_memory_that_others_write_are_not_known(tmp_path, given):
    # The numbers at these addresses would be read for the bound of the loop.
    known = GIVEN.replace("sld [smem:[%s7_s7]]", "smov 3").replace("%p8_p8", "%p1_p1")
    _, counts = read(tmp_path, known)
    assert counts.loops[0].trips == 3 and not counts.is_least
    bound = known.replace("smov 3", f"{given}  ;;  %s7_s7 = smov 3")
    stored = "%9 = sst [smem:[#allocation4]] %s1_s1  ;;  %s1_s1"
    _, counts = read(tmp_path, bound.replace("%s1_s1", stored, 1))
    assert counts.loops[0].trips is None and counts.is_least


@pytest.mark.parametrize("bound, trips", [("%s9_s9", 3), ("%s11_s9", None)])
def test_what_may_be_jumped_over_is_not_known(tmp_path, bound, trips):
    start = """
     0   :  { %s9_s9 = smov 3  ;;  %9 = sbr.rel (%p8_p8) target = $region7 }
     1   :  {}
     1   :  {}
     1   :  {}
     1   :  {}
     1   :  { %s10_s9 = smov 2 }
     1   :  { %s11_s9 = sphi %s9_s9, %s10_s9  ;;  %s1_s1 = smov 0 } /* Start region 7 */
"""
    text = start.replace("  1  ", "0x1  ") + "".join(
        f"{line}\n" for line in GIVEN.splitlines()[2:]
    ).replace("%s9_s9", bound)
    _, counts = read(tmp_path, text)
    assert [loop.trips for loop in counts.loops] == [trips]
    assert counts.is_least


def test_a_loop_that_takes_too_long_to_follow_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "_MOST_OPERATIONS", 100)
    _, counts = read(tmp_path, NESTED.replace("TRIPS", "1000"))
    assert counts.is_least and [loop.trips for loop in counts.loops] == [None, None]


def test_the_scalar_unit_computes_in_32_bits(tmp_path):
    text = NESTED.replace("TRIPS", "3").replace(
        "smov (!%p3_p2), 4294967292", "ssub.s32 (!%p3_p2), 3, 7"
    )
    _, counts = read(tmp_path, text)
    assert counts.loops[1].trips == 3 * 7


def test_schedule_of_a_program(tmp_path):
    write(
        tmp_path, "nested", NESTED.replace("TRIPS", "3"), lambda place: int(place == 9)
    )
    write(tmp_path, "given.1", GIVEN, lambda place: 4)
    write(tmp_path, "TLP", GIVEN)
    (tmp_path / "17960-TLP-00-deduplication-map.txt").write_text(
        "key:<top-inlining-caller>\nordinal:0\nequivalent_hlos[size=0]:\n"
        "key:nested\nordinal:1\nequivalent_hlos[size=2]:\n  nested\n  again\n"
    )
    schedule = schedule_of(tmp_path, HLO, DELAY)
    nested, given = schedule.parts
    # Three iterations of the loop, and once under another name.
    assert (nested.name, nested.runs, nested.is_least) == ("nested", 4, False)
    assert (given.name, given.runs, given.is_least) == ("given.1", 1, True)
    inner, outer, once = nested.loops
    assert (inner.bundles, inner.trips, inner.cycles) == (7, 21, 7 * 21)
    assert (outer.bundles, outer.trips, outer.cycles) == (15, 5, 15 * 5)
    assert (once.bundles, once.trips, once.cycles) == (2, 1, 2)
    assert inner.busy["valu"] == pytest.approx(1 / (4 * 7))
    assert outer.busy["valu"] == 0
    assert nested.cycles == 7 * 21 + 15 * 5 + 2
    assert schedule.cycles == 4 * nested.cycles + 14 and schedule.is_least
    assert schedule.busy["valu"] == pytest.approx(
        (4 * 21 + 14 * 4) / (4 * schedule.cycles)
    )
    assert schedule.busy["mxu"] == 0
    part, loop = schedule.loops[0]
    assert (part, loop) == (nested, inner)


def test_a_schedule_comes_back_from_json(tmp_path):
    write(tmp_path, "nested", NESTED.replace("TRIPS", "3"))
    schedule = schedule_of(tmp_path, HLO, DELAY)
    ran = Ran("xla", schedules={"value": schedule})
    assert Ran.from_json(json.loads(json.dumps(dataclasses.asdict(ran)))) == ran
    assert isinstance(ran.schedules["value"], Schedule)


def test_runs_of_instructions():
    assert runs_of(HLO, {}) == (
        {"x": 1, "again": 1, "given.1": 1}
        | {"state": 3, "nested": 3, "next": 3, "state.1": 3, "given": 3},
        set(),
    )
    unknown = HLO.replace("known_trip_count", "trip_count_unknown")
    times, more = runs_of(unknown, {})
    assert times["nested"] == 1
    assert more == {"state", "nested", "next", "state.1", "given"}


def test_a_part_of_a_loop_that_runs_nobody_knows_how_often(tmp_path):
    write(tmp_path, "nested", NESTED.replace("TRIPS", "3"))
    write(tmp_path, "again", NESTED.replace("TRIPS", "3"))
    unknown = HLO.replace("known_trip_count", "trip_count_unknown")
    schedule = schedule_of(tmp_path, unknown, DELAY)
    assert {part.name: part.runs_are_least for part in schedule.parts} == {
        "nested": True,
        "again": False,
    }
    assert schedule.is_least and not any(part.is_least for part in schedule.parts)
    assert schedule_of(tmp_path, "no HLO", DELAY).is_least


@pytest.mark.parametrize("heavy, light", [("a", "b"), ("b", "a")])
def test_the_heaviest_branch_runs(heavy, light):
    text = """HloModule m

%left (p: f32[]) -> f32[] {
  ROOT %a = f32[] negate(%p)
}

%right (q: f32[]) -> f32[] {
  ROOT %b = f32[] negate(%q)
}

ENTRY %main (i: s32[], x: f32[]) -> f32[] {
  ROOT %c = f32[] conditional(%i, %x, %x), branch_computations={%left, %right}
}
"""
    assert runs_of(text, {heavy: 2, light: 1}) == ({heavy: 1}, set())


def test_the_least_time_is_that_of_what_binds():
    chip = CHIPS["v6e"]
    # Two rows a cycle through two units of 256 x 256.
    assert chip.clock == pytest.approx(1.75e9, rel=1e-3)
    assert CHIPS["v5e"].clock == pytest.approx(1.5e9, rel=3e-3)
    least = least_time(chip, 1638, 918_000, 17_500)
    assert least.memory == pytest.approx(1e-9)
    assert least.products == pytest.approx(1e-9)
    assert least.issue == pytest.approx(1e-5, rel=1e-3)
    assert (least.seconds, least.binds) == (least.issue, "issue")


def test_flags_name_the_folder_once():
    assert FLAGS.format(folder="/here").count("/here") == 1
