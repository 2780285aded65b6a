"""Times of a step by hand, from programs of a few instructions."""

import dataclasses
from pathlib import Path

import jax
import pytest
from planning.plan_cases import chip_named, step_of
from planning.test_calibration import calibration_of
from small import small_config

from clip_jax.config import UserError
from clip_jax.planning import Program
from clip_jax.planning.estimate import Range, estimate
from clip_jax.planning.estimate_schedule import Schedule
from clip_jax.planning.estimate_speeds import EXPECTED, PEAK, SLOW, chip_speeds
from clip_jax.planning.topology import Topology
from clip_jax.planning.traffic import Reader

H100 = chip_named("H100 SXM")
FLOPS, BANDWIDTH, NVLINK = 989.4e12, 3350e9, 450e9

# A product that computes, 2 * 4096**3 FLOPs, and a copy that moves, twice 64 MB.
STEP = """
ENTRY %main (a: bf16[4096,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  BEFORE
  %dot = bf16[4096,4096]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  AFTER
  %wide = f32[4096,4096]{1,0} convert(%dot)
  ROOT %out = f32[4096,4096]{1,0} copy(%wide)
}
"""
SIDE = 4096
PRODUCT = 2 * SIDE**3 / FLOPS
MOVED = (6 + 8) * SIDE**2 / BANDWIDTH  # the convert and the copy
START = (
    "%start = (bf16[4096,4096]{1,0}, bf16[8192,4096]{1,0}) all-gather-start(%a), "
    "replica_groups={{0,1}}, dimensions={0}"
)
DONE = "%done = bf16[8192,4096]{1,0} all-gather-done(%start)"
SENT = 2 * 2 * SIDE**2 / 2 / NVLINK


def program_of(before="", after=""):
    return STEP.replace("BEFORE", before).replace("AFTER", after)


def topology_of(num_devices=1, *, platform="gpu", chip=H100):
    return Topology(
        name="made:by-hand",
        platform=platform,
        devices=tuple(jax.devices()[:num_devices]),
        chip=chip,
        num_hosts=1,
        num_slices=1,
        memory_bytes=None,
    )


def estimate_of(program, num_devices=1, *, topology=None, changes=(), **settings):
    config = small_config(
        mesh=(num_devices, 1, 1), precision="bfloat16", num_steps=86400, **dict(changes)
    )
    step = step_of(config, program=program, analytic_flops=10**12)
    return estimate(step, topology or topology_of(num_devices), **settings)


def test_each_instruction_takes_the_longer_of_computing_and_moving():
    found = estimate_of(program_of())
    assert found.flops == 2 * SIDE**3
    assert found.flops_by_dtype == {"bf16": 2 * SIDE**3}
    assert found.memory_bytes == (6 + 6 + 8) * SIDE**2  # a is both operands of the product
    assert found.compute_seconds == pytest.approx(PRODUCT)
    assert found.chip_seconds == pytest.approx(PRODUCT + MOVED)
    assert found.bound_by == "compute"
    low, expected, high = found.step_seconds
    assert low == pytest.approx(PRODUCT)  # all else at once
    assert found.memory_seconds == pytest.approx(20 * SIDE**2 / BANDWIDTH)
    shares = EXPECTED["gpu"]
    kernels = 3 * shares.kernel_seconds
    assert expected == pytest.approx(PRODUCT / shares.products + MOVED / shares.memory + kernels)
    assert high > expected


def test_the_bound_is_the_longest_of_what_can_go_on_at_once():
    """Whatever the order of instructions is."""
    moving = program_of(
        after="%more = f32[4096,4096] copy(%dot)\n  %again = f32[4096,4096] copy(%dot)"
    )
    found = estimate_of(moving)
    assert found.step_seconds.low == pytest.approx(found.memory_seconds)
    assert found.chip_seconds > max(found.compute_seconds, found.memory_seconds)


def test_what_a_run_costs_follows_from_the_step_time():
    found = estimate_of(program_of(), price_per_chip_hour=2.5)
    seconds = found.step_seconds
    assert found.samples_per_second == pytest.approx(Range(*(32 / each for each in seconds)))
    assert found.days == pytest.approx(seconds)  # 86,400 steps
    assert found.chip_hours == pytest.approx(Range(*(24 * each for each in seconds)))
    assert found.cost == pytest.approx(Range(*(60 * each for each in seconds)))
    # As `training.throughput`: analytic FLOPs of the batch against the peak.
    assert found.mfu == pytest.approx(Range(*(32 * 1e12 / each / FLOPS for each in seconds)))


def test_low_hides_all_communication_and_high_none():
    sync = "%sync = bf16[8192,4096]{1,0} all-gather(%a), replica_groups={{0,1}}, dimensions={0}"
    found = estimate_of(program_of(before=sync), 2)
    (traffic,) = found.traffic
    assert (traffic.kind, traffic.axes, traffic.link) == ("all-gather", ("data",), "NVLink")
    assert traffic.num_bytes == 2 * SIDE**2
    assert traffic.seconds == pytest.approx(SENT) == found.communication_seconds
    assert traffic.asynchronous == 0
    alone = estimate_of(program_of(), 2)
    assert found.step_seconds.low == pytest.approx(alone.step_seconds.low)
    for name, shares in (("expected", EXPECTED["gpu"]), ("high", SLOW["gpu"])):
        more = getattr(found.step_seconds, name) - getattr(alone.step_seconds, name)
        assert more == pytest.approx(SENT / shares.links + shares.link_seconds["NVLink"])


def test_expected_hides_what_has_work_between_its_start_and_its_done():
    alone = estimate_of(program_of(), 2)
    behind = estimate_of(program_of(before=START, after=DONE), 2)
    assert behind.traffic[0].asynchronous == pytest.approx(1)
    assert behind.step_seconds.expected == pytest.approx(alone.step_seconds.expected)
    at_once = estimate_of(program_of(before=f"{START}\n  {DONE}"), 2)
    assert at_once.traffic[0].asynchronous == 0
    assert at_once.step_seconds.expected > alone.step_seconds.expected
    assert at_once.step_seconds.high == pytest.approx(behind.step_seconds.high)


COPY = "%copy = (f32[8192,4096]{1,0:S(1)}, f32[8192,4096]{1,0}, u32[]) copy-start(%b)"
COPIED = 4 * 8192 * 4096 / BANDWIDTH  # of both arrays one is on the chip


@pytest.mark.parametrize(
    ("before", "after", "hidden"),
    [
        (COPY, "%there = f32[8192,4096]{1,0:S(1)} copy-done(%copy)", True),
        (f"{COPY}\n  %there = f32[8192,4096]{{1,0:S(1)}} copy-done(%copy)", "", False),
        # Behind the product, and behind what keeps the memory busy itself.
        ("", f"{COPY}\n  %b2 = f32[4096,4096] convert(%dot)\n  %there = f32[8192,4096] "
         "copy-done(%copy)", False),
    ],
)  # fmt: skip
def test_a_copy_hides_behind_work_that_leaves_the_memory_idle(before, after, hidden):
    argument = "%b = f32[8192,4096]{1,0} parameter(1)"
    texts = [program_of(before=f"{argument}\n  {before}", after=after)]
    texts.append("\n".join(line for line in texts[0].splitlines() if " copy-" not in line))
    slow = dataclasses.replace(chip_speeds(H100, "gpu", PEAK), memory=10 * BANDWIDTH)
    schedules = [Schedule(Reader(Program(each)), slow, lambda _: 0.0) for each in texts]
    more = schedules[0].spent.total - schedules[1].spent.total
    assert more == pytest.approx(0 if hidden else COPIED / 10, abs=1e-12)
    assert schedules[0].serial_seconds == pytest.approx(schedules[1].serial_seconds + COPIED / 10)


def test_two_collectives_do_not_hide_behind_the_same_work():
    second = START.replace("%start", "%start.2"), DONE.replace("%start", "%start.2")
    both = program_of(
        before=f"{START}\n  {second[0]}", after=f"{DONE}\n  {second[1].replace('%done', '%done.2')}"
    )
    reader = Reader(Program(both))
    speeds = chip_speeds(H100, "gpu", PEAK)
    schedule = Schedule(reader, speeds, lambda _: 0.75 * PRODUCT)
    hidden = [each.hidden_seconds for each in schedule.collectives]
    assert sum(hidden) == pytest.approx(PRODUCT)
    assert max(hidden) == pytest.approx(0.75 * PRODUCT)


LOOP = """
%condition (p: (s32[], bf16[4096,4096])) -> pred[] {
  %p = (s32[], bf16[4096,4096]) parameter(0)
  %limit = s32[] constant(3)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%sending (b: bf16[4096,4096]) -> bf16[8192,4096] {
  %b = bf16[4096,4096] parameter(0)
  ROOT %part = bf16[8192,4096] all-gather(%b), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%multiplying (c: bf16[4096,4096]) -> bf16[4096,4096] {
  %c = bf16[4096,4096] parameter(0)
  %copy = bf16[8192,4096] all-gather(%c), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %dot = bf16[4096,4096] dot(%c, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (q: (s32[], bf16[4096,4096])) -> (s32[], bf16[4096,4096]) {
  %q = (s32[], bf16[4096,4096]) parameter(0)
  %one = s32[] constant(1)
  %j = s32[] get-tuple-element(%q), index=0
  %x = bf16[4096,4096] get-tuple-element(%q), index=1
  %next = s32[] add(%j, %one)
  %send = bf16[8192,4096] fusion(%x), kind=kCustom, calls=%sending
  %y = bf16[4096,4096] fusion(%x), kind=kOutput, calls=%multiplying
  ROOT %r = (s32[], bf16[4096,4096]) tuple(%next, %y)
}

ENTRY %main (x0: bf16[4096,4096]) -> (s32[], bf16[4096,4096]) {
  %x0 = bf16[4096,4096] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4096,4096]) tuple(%zero, %x0)
  ROOT %loop = (s32[], bf16[4096,4096]) while(%start), condition=%condition, body=%body
}
"""


def test_what_tpus_spread_over_fusions_hides_behind_them_each_time_round():
    schedule = Schedule(
        Reader(Program(LOOP)), chip_speeds(H100, "gpu", PEAK), lambda _: 0.5 * PRODUCT
    )
    (timed,) = schedule.collectives
    assert timed.seconds == pytest.approx(3 * 0.5 * PRODUCT)
    assert timed.hidden_seconds == pytest.approx(timed.seconds)
    assert schedule.spent.total == pytest.approx(3 * PRODUCT, rel=1e-3)


TWO_SLICES = (Path(__file__).parent / "two_slices.hlo").read_text()
IDS = (100000, 100001, 100003, 100002, 200000, 200001, 200003, 200002)


def test_what_goes_to_other_slices_hides_between_its_send_and_its_receipt():
    program = Program(TWO_SLICES, device_ids=IDS)
    speeds = chip_speeds(chip_named("TPU v5e"), "tpu", PEAK)
    product = 2 * 2048**3 / 197e12
    schedule = Schedule(Reader(program), speeds, lambda _: 2 * product)
    hidden = {each.collective.name: each.hidden_seconds for each in schedule.collectives}
    assert hidden["send.52"] == pytest.approx(product)
    assert hidden["reduced"] == hidden["send.62"] == 0
    assert schedule.spent.total == pytest.approx(product, rel=1e-3)


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    id: int
    coords: tuple[int, ...]
    slice_index: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def test_slices_and_the_network_between_them_have_rows_of_their_own():
    corners = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0))
    places = [(slice_index, i) for slice_index in range(2) for i in range(4)]
    devices = [SliceDevice((s + 1) * 10**5 + i, corners[i], s, s) for s, i in places]
    topology = dataclasses.replace(
        topology_of(platform="tpu", chip=chip_named("TPU v5e")), devices=tuple(devices)
    )
    step = step_of(small_config(mesh=(2, 4, 1), precision="bfloat16"), program=TWO_SLICES)
    step = dataclasses.replace(step, program=Program(TWO_SLICES, device_ids=IDS))
    found = estimate(step, topology)
    rows = {(row.kind, row.link): (row.axes, row.times, row.num_bytes) for row in found.traffic}
    assert rows == {
        ("all-reduce", "ICI"): (("fsdp",), 1, 2 * 16384 * 3 // 4),
        ("all-reduce", "DCN"): (("data",), 1, 16384),
        ("collective-permute", "ICI"): (("fsdp",), 6, 6 * 64),
        ("collective-permute", "DCN"): (("data",), 6, 6 * 64),
    }
    # Seven messages between slices, 50 us each, of which the product hides little.
    assert found.step_seconds.expected > 7 * 40e-6
    assert found.bound_by == "overhead"


HOST = """
ENTRY %main (a: bf16[4096,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %out = (bf16[4096,4096]{1,0:S(5)}, bf16[4096,4096]{1,0}, u32[]) copy-start(%a)
  %dot = bf16[4096,4096]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %there = bf16[4096,4096]{1,0:S(5)} copy-done(%out)
  ROOT %b = bf16[4096,4096]{1,0} copy(%dot)
}
"""


def test_what_goes_to_the_host_takes_its_own_link():
    found = estimate_of(HOST)
    assert found.host_bytes == 2 * SIDE**2
    assert found.host_seconds == pytest.approx(2 * SIDE**2 / 32e9)
    assert found.step_seconds.low == pytest.approx(found.host_seconds)
    shares = EXPECTED["gpu"]
    assert found.step_seconds.expected == pytest.approx(found.host_seconds / shares.host)
    assert found.bound_by == "host"
    assert any("16 expected, 8 at worst" in line for line in found.assumptions)
    assert estimate_of(program_of()).host_bytes == 0


def test_launches_are_neither_computing_nor_moving():
    small = program_of().replace("4096", "16")
    assert estimate_of(small).bound_by == "overhead"


def test_products_in_full_float32_are_slower_and_unknown_ones_an_error():
    exact = program_of().replace("dims={0}", "dims={0}, operand_precision={highest,highest}", 1)
    wide = exact.replace("bf16", "f32")
    rate = 494.7e12 / 8
    assert estimate_of(wide).compute_seconds == pytest.approx(2 * SIDE**3 / rate)
    assert estimate_of(program_of().replace("bf16", "f32")).compute_seconds == pytest.approx(
        2 * SIDE**3 / 494.7e12
    )
    looked_up = program_of().replace("bf16", "pred")
    assert estimate_of(looked_up).compute_seconds == pytest.approx(PRODUCT)
    with pytest.raises(UserError, match="multiplies c64"):
        estimate_of(program_of().replace("bf16", "c64"))


def test_fused_attention_does_not_move_its_scores():
    scores = """
ENTRY %main (a: bf16[12,8,8], b: f32[100]) -> f32[100] {
  %a = bf16[12,8,8] parameter(0)
  %b = f32[100] parameter(1)
  %wide = f32[12,8,8] convert(%a)
  ROOT %c = f32[100] negate(%b)
}
"""
    step = step_of(small_config(mesh=(1, 1, 1), precision="bfloat16"), program=scores)
    assert estimate(step, topology_of()).memory_bytes == 12 * 64 * 6 + 800
    assert estimate(step, topology_of()).flops == 0
    fused = estimate(dataclasses.replace(step, attention="cudnn"), topology_of())
    assert fused.memory_bytes == 800
    # Its backward pass computes them once more: 32 samples, two towers, all blocks but the last.
    image, text = step.config.model.image, step.config.model.text
    tokens = (image.image_size // image.patch_size) ** 2 + image.class_token
    products = [(tokens, image), (text.context_length, text)]
    scores = sum(2 * length**2 * tower.width * (tower.depth - 1) for length, tower in products)
    assert fused.flops_by_dtype == {"bf16": 32 * scores}
    assert fused.chip_seconds == pytest.approx(32 * scores / FLOPS + 800 / BANDWIDTH)
    assert any("XLA's attention" in line for line in fused.assumptions)


def test_a_calibrated_cpu_is_within_a_quarter_and_another_a_guess():
    cpu = topology_of(2, platform="cpu", chip=None)
    settings = {"topology": cpu, "changes": (("global_batch_size", 32),)}
    calibrated = estimate_of(program_of(), 2, calibration=calibration_of(), **settings)
    low, expected, high = calibrated.step_seconds
    # Both devices share the rate, the bandwidth and the cores.
    products, memory = 1.5 * 2 * SIDE**3 / 50e9, 2.0 * 14 * SIDE**2 / 10e9
    assert expected == pytest.approx(2 * (products + memory) + 3 * 2e-6)
    assert (low, high) == pytest.approx((expected / 1.25, expected * 1.25))
    assert calibrated.mfu.expected == pytest.approx(32e12 / expected / 50e9)
    assert calibrated.chip_hours.expected == pytest.approx(24 * expected)  # one machine
    guessed = estimate_of(program_of(), 2, **settings)
    assert guessed.mfu is None
    assert any("not calibrated" in line for line in guessed.assumptions)
    assert any("16% in step time" in line for line in calibrated.assumptions)
    assert not any("16% in step time" in line for line in guessed.assumptions)
    assert guessed.step_seconds.high == pytest.approx(9 * guessed.step_seconds.low)
