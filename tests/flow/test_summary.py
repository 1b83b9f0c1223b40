"""The words about a recording: right kind, right step, right advice, on both sides of every threshold."""

import math
from dataclasses import replace

import pytest
import torch

from lstmcore.flow import summary
from lstmcore.flow.measure import VANISHED, measure
from lstmcore.flow.summary import KINDS, number, share, summarize

from ..support.flow_records import fed, gates, geometric, record


def kinds(*records) -> list[str]:
    return [finding.kind for finding in summarize(records).findings]


def only(*records):
    """The only finding, and its text."""
    (finding,) = summarize(records).findings
    return finding, finding.text


def test_vanishing_lstm():
    finding, text = only(record(0.51, module="encoder.lstm", kind=None))
    assert finding.kind == "vanishing"
    assert finding.where == "encoder.lstm, layer 0"
    lag = math.ceil(math.log(1e-6) / math.log(0.51))  # 21
    assert finding.numbers["lag"] == lag
    assert finding.numbers["step"] == 199 - lag
    assert f"from lag {lag} (step {199 - lag}) on" in text
    assert "keeps 51% of it" in text
    assert "halves every 1.0 steps" in text
    assert finding.numbers["rate"] == pytest.approx(0.51, rel=1e-3)
    assert finding.numbers["ratio_100"] == pytest.approx(0.51**100, rel=1e-5)
    assert f"{number(0.51**100)} is left at lag 100" in text
    assert "nothing (exactly 0) arrives at lag 199 (step 0)" in text  # below what float32 holds
    assert "lstmcore.init.chrono_(model.encoder.lstm, max_lag=200)" in finding.advice
    assert "lstmcore.init.forget_bias_(model.encoder.lstm, 1.0)" in finding.advice


@pytest.mark.parametrize(("end", "kind"), [(0.9e-6, "vanishing"), (1.1e-6, "healthy")])
def test_threshold_of_vanishing(end, kind):
    found = kinds(record(end ** (1 / 49), steps=50))
    assert found == [kind]


def test_vanishes_only_where_it_stays_below():
    curve = torch.ones(50, dtype=torch.float64)
    curve[10:30] = 1e-9
    assert kinds(record(curve=curve)) == ["healthy"]
    curve[40:] = 1e-9
    finding, _ = only(record(curve=curve))
    assert (finding.kind, finding.numbers["lag"]) == ("vanishing", 40)


def test_vanishing_plain_rnn():
    finding, text = only(record(0.6, 60, plain=True, module=""))
    assert finding.kind == "vanishing"
    assert finding.where == "layer 0"
    assert "lstmcore.LSTM in place of model:" in finding.advice
    assert "chrono_" not in finding.advice
    assert f"lag {finding.numbers['lag']}" in text


def test_reverse_direction_counts_steps_from_the_front():
    finding, text = only(record(0.5, 60, direction=1))
    assert finding.numbers["lag"] == finding.numbers["step"] == 20
    assert "lag 20 (step 20)" in text
    assert "arrives at lag 59 (step 59)" in text


def test_ragged_rows_have_lags_and_no_steps():
    finding, text = only(record(0.5, 60, lengths=torch.tensor([60, 30, 45, 52])))
    assert finding.kind == "vanishing"
    assert "from lag 20 on" in text
    assert "(step" not in text
    assert "step" not in finding.numbers


def test_ragged_rows_with_a_loss_everywhere_are_not_judged_by_their_norms():
    lengths = torch.tensor([60, 30, 45, 52])
    assert kinds(record(0.99, 60, lengths=lengths)) == ["healthy"]
    assert kinds(record(0.99, 60, lengths=lengths, loss="all")) == ["unclear"]


def test_rows_shorter_than_the_record_end_where_the_longest_does():
    finding, _ = only(record(0.9, 60, lengths=torch.tensor([20, 40])))
    assert finding.numbers["far"] == 39
    assert finding.numbers["ratio_far"] == pytest.approx(0.9**39 * 1.5, rel=0.01)  # the longest row of two, over both


def test_exploding():
    finding, text = only(record(1.25, 100))
    assert finding.kind == "exploding"
    assert "each step back multiplies it by 1.25" in text
    assert f"at lag 99 (step 0) it is {number(1.25**99)} times what it is at lag 0 (step 99)" in text
    assert "clip_grad_norm_(model.parameters(), 1.0)" in finding.advice
    assert "orthogonal_" in finding.advice


@pytest.mark.parametrize(("growth", "kind"), [(900, "healthy"), (1100, "exploding")])
def test_threshold_of_exploding(growth, kind):
    assert kinds(record(growth ** (1 / 99), 100)) == [kind]


def test_many_losses_that_add_up_do_not_explode():
    steps = 3000  # each step's loss adds as much as the last one's
    finding, _ = only(record(1.0, steps, loss="all"))
    assert finding.numbers["ratio_far"] == pytest.approx(steps)
    assert finding.kind == "unclear"


def test_non_finite_by_overflow():
    each = record(curve=geometric(400, 1.5, 1e-3))
    lag = int(each.c.mean_by_lag.isinf().nonzero()[0])
    finding, after = summarize([each]).findings
    assert (finding.kind, after.kind) == ("non-finite", "exploding")
    assert (finding.numbers["lag"], finding.numbers["step"]) == (lag, 399 - lag)
    assert f"first at lag {lag} (step {399 - lag}), in at least half of the rows" in finding.text
    assert "overflowed" in finding.text
    assert "GradScaler" in finding.advice


def test_non_finite_from_the_loss():
    curve = torch.full((30,), math.nan, dtype=torch.float64)
    finding, text = only(record(curve=curve))
    assert finding.kind == "non-finite"
    assert "first at lag 0 (step 29)" in text
    assert "the loss or the forward pass brought it in" in text


def test_non_finite_in_an_earlier_pass_is_not_forgotten():
    curve = torch.ones(30, dtype=torch.float64)
    curve[7:] = math.inf
    early, late = record(curve=curve, iteration=3), [record(0.99, 30, iteration=n) for n in (4, 5)]
    finding, main = summarize([early, *late]).findings
    assert (finding.kind, main.kind) == ("non-finite", "healthy")
    assert "in iteration 3, though it is in the last one" in finding.text
    assert "in 1 of the 3 passes" in finding.text


def test_healthy():
    finding, text = only(record(0.995, 300, kind=gates(300, forget=0.995)))
    assert finding.kind == "healthy"
    assert finding.advice == ""
    assert f"{share(0.995**299)} arrives at lag 299 (step 0)" in text
    assert share(0.995**299) == "22%"
    assert "keeps 99.5% of it" in text
    assert "a sequence of 2800 steps would lose it" in text  # ln 1e-6 / ln 0.995


def test_how_it_changed():
    before, after = record(0.5, 50, iteration=0), record(0.98, 50, iteration=40)
    finding, text = only(after, before)  # in whatever order they come
    assert finding.kind == "healthy"
    assert f"At the start of the recording it was {share(0.5**49)} at lag 49, now it is {share(0.98**49)}" in text
    assert "it was about the same" in only(before, replace(before, iteration=1))[1]
    shorter = record(0.5, 20, iteration=0)
    assert f"it was {share(0.5**19)} at lag 19, now it is {share(0.98**19)}" in only(shorter, after)[1]


def test_no_gradient():
    finding, text = only(record(curve=torch.zeros(20, dtype=torch.float64)))
    assert finding.kind == "no-gradient"
    assert "exactly 0" in text
    assert ".detach()" in finding.advice


def test_loss_at_every_step_is_judged_by_the_horizons():
    short = summarize([record(0.5, loss="all", kind=gates(200, forget=0.5))]).findings
    assert [finding.kind for finding in short] == ["unclear", "short-horizon"]
    assert "The loss sends gradient to almost every step" in short[0].text
    assert "lstmcore.cell_jacobian(model.lstm, input, layer=0)" in short[0].advice
    assert "after 1.0 steps" in short[1].text
    assert "0% of the units keep half beyond all 200 steps" in short[1].text
    assert "chrono_(model.lstm, max_lag=200)" in short[1].advice
    finding, text = only(record(0.5, loss="all", kind=gates(200, 4, forget=[0.5, 0.9, 0.999, 1.0])))
    assert finding.kind == "unclear"
    assert finding.numbers["longest"] == math.inf
    assert finding.numbers["beyond"] == 0.5
    assert "longest never" in text


@pytest.mark.parametrize(("horizon", "short"), [(19.5, True), (20.5, False)])
def test_threshold_of_horizons(horizon, short):
    found = kinds(record(0.5, loss="all", kind=gates(200, forget=[0.3] * 7 + [0.5 ** (1 / horizon)])))
    assert ("short-horizon" in found) == short


def test_short_horizons_are_no_problem_where_the_gradient_crosses():
    assert kinds(record(0.999, kind=gates(200, forget=0.5))) == ["healthy"]
    assert kinds(record(0.5, kind=gates(200, forget=0.5))) == ["vanishing", "short-horizon"]


def test_loss_at_the_last_few_steps():
    """What lies before them shows the truth: it decays from there on."""
    curve = torch.cat([torch.ones(40, dtype=torch.float64), geometric(160, 0.5, 0.5)])
    each = fed(record(curve=curve), torch.cat([torch.zeros(160), torch.ones(40)]))
    finding, _ = only(each)
    assert finding.kind == "vanishing"
    assert finding.numbers["rate"] == pytest.approx(0.5, rel=0.02)


def test_layer_below_another():
    """It gets gradient at every step, from the layer above."""
    below, above = record(0.99, loss="all"), record(0.99, layer=1)
    found = summarize([below, above]).findings
    assert [(each.where, each.kind) for each in found] == [("lstm, layer 0", "unclear"), ("lstm, layer 1", "healthy")]
    assert "The layer above sends gradient" in found[0].text
    assert "output[-1]" not in found[0].advice  # a loss at the last step alone changes nothing there
    fading = fed(record(0.5), geometric(200, 0.5, 0.3).flip(0))
    text = summarize([fading, record(0.5, layer=1)]).findings[0].text
    assert "What the layer above sends fades with it" in text
    growing = fed(record(1.3, 100), geometric(100, 1.3).flip(0))
    finding = summarize([growing, record(1.3, 100, layer=1)]).findings[0]
    assert finding.kind == "exploding"
    assert "look there first" in finding.text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"forget": 0.03}, "forget gates are mostly closed"),
        ({"output": 0.03}, "output gates are mostly closed"),
        ({"input": 0.03}, "input gates are mostly closed"),
        ({"forget": 0.97}, None),  # open: wanted
        ({"forget": 0.97, "input": 0.03}, None),  # as chrono begins
        ({}, None),
    ],
)
def test_saturated_gates(values, says):
    found = summarize([record(0.99, kind=gates(200, spread=0.2, **values))]).findings
    texts = [finding.text for finding in found if finding.kind == "saturated"]
    assert len(texts) == (says is not None)
    if says:
        assert says in texts[0]
        assert "82% of their values are below 0.1" in texts[0]  # 80% and a tenth of the rest
        advice = next(finding.advice for finding in found if finding.kind == "saturated")
        assert ("forget_bias_(model.lstm, 1.0)" in advice) == ("forget" in values)


@pytest.mark.parametrize(("closed", "found"), [(0.48, False), (0.52, True)])
def test_threshold_of_closed_gates(closed, found):
    each = gates(20)
    each.histogram[2] = 0
    each.histogram[2, :, 0], each.histogram[2, :, 5] = closed, 1 - closed
    assert ("saturated" in kinds(record(0.99, 20, kind=each))) == found


def test_gates_that_are_switches():
    each = gates(20)
    each.histogram[0] = 0
    each.histogram[0, :, 0], each.histogram[0, :, -1], each.histogram[0, :, 4] = 0.45, 0.47, 0.08
    saturated, _ = summarize([record(0.99, 20, kind=each)]).findings
    assert "input gates have become switches (45% closed, 47% open)" in saturated.text


@pytest.mark.parametrize("plain", [False, True])
def test_one_step(plain):
    finding, text = only(record(0.5, 1, plain=plain, kind=gates(1)))
    assert finding.kind == "unclear"
    assert "one step long" in text


def test_two_steps_get_an_advice_that_runs():
    each = record(curve=torch.tensor([1.0, 1e-9], dtype=torch.float64))
    finding, _ = only(each)
    assert finding.kind == "vanishing"
    assert "chrono_" not in finding.advice  # it wants three
    assert "forget_bias_" in finding.advice


def test_empty_recording_says_what_to_do():
    with pytest.raises(ValueError, match=r"loss\.backward\(\) inside `with lstmcore\.record_gradient_flow"):
        summarize([])


def test_module_that_is_no_attribute():
    finding, _ = only(record(0.5, module="layers.0.lstm"))
    assert 'lstmcore.init.chrono_(model.get_submodule("layers.0.lstm"), max_lag=200)' in finding.advice
    finding, _ = only(record(0.5, module=""))
    assert "chrono_(model, max_lag=200)" in finding.advice


def test_the_text():
    records = [
        record(0.5, iteration=n, module=name, layer=layer, direction=d, kind=gates(200))
        for n in (0, 5)
        for name in ("decoder", "encoder.a_module_of_a_rather_long_name")
        for layer in (0, 1)
        for d in (0, 1)
    ]
    found = summarize(records)
    text = str(found)
    assert max(map(len, text.splitlines())) < 100
    assert text.startswith(
        "Gradient flow of 4 layers, both directions, in 2 recorded backward passes (iterations 0 to 5)"
    )
    titles = [line for line in text.splitlines() if line.endswith("vanishing, short-horizon")]
    assert len(titles) == 8
    assert titles[0] == "decoder, layer 0: vanishing, short-horizon"
    assert titles[-1].startswith("encoder.a_module_of_a_rather_long_name, layer 1, reverse direction: ")
    assert text.count("Try: lstmcore.init.chrono_(model.decoder, max_lag=200)") == 4  # not twice in a block
    assert {finding.kind for finding in found.findings} <= set(KINDS)
    assert all(isinstance(value, (int, float)) for finding in found.findings for value in finding.numbers.values())


def test_numbers():
    values = {
        0.5101: "0.51",
        3e-12: "3e-12",
        3.14e-12: "3.1e-12",
        1234.0: "1200",
        0.0: "0",
        1e-3: "0.0010",
        99.6: "100",
    }
    assert {value: number(value) for value in values} == values
    assert number(math.inf) == "inf"
    kept = (0.51, 0.986, 0.995, 0.99934, 0.99, 0.04)
    assert [summary._kept(rate) for rate in kept] == ["51%", "98.6%", "99.5%", "99.934%", "99%", "4.0%"]
    assert [share(value) for value in (0.616, 0.002, 3e-12, 0.0, 1.0)] == ["62%", "0.20%", "3e-12", "0%", "100%"]


def test_measure_agrees_with_the_record():
    flow = measure(record(0.9, 50))
    assert (flow.start, flow.far, flow.peak, flow.reach, flow.vanished, flow.broken) == (0, 49, 0, 0, None, None)
    assert flow.ratio(10) == pytest.approx(0.9**10, rel=1e-6)
    assert VANISHED == 1e-6
