import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karla_hf.grokking import GrokkingDetector, Probe, State, explained
from karla_hf.slow_gradients import SlowGradients


def run(scores, *, losses=None, norms=None, train=1.0, every=25, stall_ratio=20.0):
    """The detector after probes with these validation scores, 25 steps apart."""
    detector = GrokkingDetector(stall_ratio)
    for number, score in enumerate(scores):
        detector.update(
            Probe(
                step=every * (number + 1),
                train_loss=0.0,
                val_loss=losses[number] if losses else 5.0,
                weight_norm=norms[number] if norms else 10.0,
                train_score=train,
                val_score=score,
            )
        )
    return detector


def test_a_run_that_grokked():
    detector = run([0.0, 0.0, 0.1, 0.2, 0.6, 0.94, 0.96, 0.97, 0.995, 1.0])
    assert [state.value for state in detector.states[:3]] == ["FIT", "MEMORISED", "MEMORISED"]
    assert detector.summary() == {
        "state": "GROKKED",
        "mem_step": 50,
        "t50": 125,
        "t95": 175,
        "t99": 225,
        "detected_step": 200,
        "delay_ratio": 3.5,
    }


def test_one_good_probe_is_not_enough_and_a_dip_does_not_undo_it():
    assert run([0, 0, 0, 0, 0, 0, 0, 0.96]).state is not State.GROKKED
    detector = run([0, 0, 0, 0, 0, 0, 0, 0.96, 0.9, 0.96])
    assert (detector.state, detector.t95, detector.detected_step) == (State.GROKKED, 200, 250)


def test_generalisation_without_delay_is_not_grokking():
    detector = run([0.0, 0.0, 0.96, 0.97, 0.99, 0.99])
    assert (detector.state, detector.mem_step, detector.t95, detector.detected_step) == (State.FIT, None, None, None)


def test_a_run_that_never_fits_or_has_no_gap_stays_in_fit():
    assert run([0.0] * 30, train=0.98).state is State.FIT
    assert run([0.6] * 30).state is State.FIT  # a gap of .4


def test_falling_validation_loss_or_norm_announce_it():
    falling = [8, 9, 10, 9, 8, 7.6, 7.2, 7]
    assert run([0.0] * 8, losses=falling).state is State.PRE_GROK
    assert run([0.0] * 8, losses=[10 + (loss - 10) / 10 for loss in falling]).state is State.MEMORISED  # by 3 % only
    little = [10, 10, 10.5, 10.4, 10.3, 10.2, 10.1, 10.0]
    assert run([0.0] * 8, losses=little, norms=[50, 50, 50, 49, 49, 48, 48, 47]).state is State.PRE_GROK
    assert run([0.0] * 8, losses=falling[::-1], norms=[50, 50, 50, 49, 49, 48, 48, 47]).state is State.MEMORISED


def test_stalled_after_the_ratio_and_not_before():
    detector = run([0.0] * 40, stall_ratio=10)
    assert detector.states[18] is State.MEMORISED
    assert detector.states[19] is State.STALLED  # step 500 = 10 * 50
    late = run([0.0] * 40 + [0.96, 0.96], stall_ratio=10)
    assert (late.state, late.t95) == (State.GROKKED, 1025)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=60),
    st.lists(st.floats(0, 30), min_size=60, max_size=60),
    st.integers(1, 59),
)
def test_saving_and_loading_anywhere_changes_nothing_and_detection_is_timely(scores, losses, cut):
    whole = run(scores, losses=losses)
    first = run(scores[:cut], losses=losses)
    second = GrokkingDetector.from_dict(first.to_dict())
    for probe in whole.probes[cut:]:
        second.update(probe)
    assert second.to_dict() == whole.to_dict()
    if whole.state is State.GROKKED:
        assert whole.t95 >= 3 * whole.mem_step
        confirmed = [probe.step for probe in whole.probes if probe.step >= whole.t95 and probe.val_score >= 0.95]
        assert confirmed[1] <= whole.detected_step
        assert sum(probe.val_score >= 0.95 for probe in whole.probes if probe.step > whole.mem_step) >= 2


def test_probes_come_in_order_and_a_ratio_above_one():
    detector = run([0.0])
    with pytest.raises(ValueError, match="A probe of step 25 came after one of step 25; give them in order"):
        detector.update(detector.probes[0])
    with pytest.raises(ValueError, match="`stall_ratio` is 1; give a number above 1"):
        GrokkingDetector(1)


def test_score_of_a_loss():
    assert explained(0.0, 7) == 1.0
    assert explained(2 * math.log(7), 7) == pytest.approx(-1.0)


def test_slow_gradients_equal_their_equation_also_for_a_parameter_that_joins_late():
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for name in "ab"}
    slow, averages = SlowGradients(alpha=0.9, lamb=3.0), {}
    for step in range(6):
        given_gradients = {}
        for name, parameter in parameters.items():
            parameter.grad = None
            if name == "a" or step >= 2:
                gradient = torch.randn(3, generator=generator, dtype=torch.float64)
                parameter.grad, given_gradients[name] = gradient.clone(), gradient
        slow.apply(parameters.items())
        for name, gradient in given_gradients.items():
            averages[name] = gradient if name not in averages else 0.9 * averages[name] + 0.1 * gradient
            torch.testing.assert_close(parameters[name].grad, gradient + 3.0 * averages[name], rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match=r"alpha is 1.0 and lamb 2.0; give alpha in \[0, 1\)"):
        SlowGradients(alpha=1.0)
