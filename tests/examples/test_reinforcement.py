"""The T-maze: its rules, that a memory is needed, what training reads of a rollout, and the program around it."""

from __future__ import annotations

import argparse
import itertools

import pytest
import torch

import reinforcement
from reinforcement import BUMP, CORRIDOR, JUNCTION, LEFT, RIGHT, SIGN_LEFT, WALK, TMaze
from tests.support.examples import interrupt, refused, same, state_of

TINY = (
    *("--batch", "4", "--steps", "12", "--shortest", "2", "--longest", "4", "--hidden-size", "5"),
    *("--epochs", "2", "--test-episodes", "8", "--save-every", "2"),
)


@pytest.fixture
def run(tmp_path):
    return lambda *arguments, out="out": reinforcement.main([*TINY, "--out", str(tmp_path / out), *arguments])


def options_of(*arguments: str) -> argparse.Namespace:
    return reinforcement.parser().parse_args([*TINY, *arguments])


# ---------------------------------------------------------------------------------------------------------------- task


def test_a_walk_through_the_maze():
    maze = TMaze(1, 3, 3, seed=0)
    goal = int(maze.goal)
    seen = []
    for action in (WALK, LEFT, WALK, WALK, WALK):
        seen.append(int(maze.observe().argmax()))
        reward, done, solved = maze.step(torch.tensor([action]))
        assert reward.item() == pytest.approx(BUMP if len(seen) in (2, 5) else 0), "the walls"
        assert not done
        assert not solved
    assert seen == [SIGN_LEFT + goal, CORRIDOR, CORRIDOR, CORRIDOR, JUNCTION]
    assert int(maze.observe().argmax()) == JUNCTION
    reward, done, solved = maze.step(torch.tensor([goal]))
    assert (reward.item(), bool(done), bool(solved)) == (1, True, True)
    assert int(maze.observe().argmax()) == SIGN_LEFT + int(maze.goal), "the next episode has begun"


def test_the_wrong_side_and_standing_about():
    maze = TMaze(2, 2, 2, seed=1)
    for _ in range(2):
        maze.step(torch.tensor([WALK, LEFT]))
    reward, done, solved = maze.step(torch.tensor([1 - int(maze.goal[0]), RIGHT]))
    assert reward.tolist() == pytest.approx([-1, BUMP])
    assert done.tolist() == [True, False]
    assert not solved.any()
    reward, done, solved = maze.step(torch.tensor([WALK, RIGHT]))
    assert done.tolist() == [False, True], "after twice the longest corridor"
    assert reward.tolist() == [0, -1]
    assert not solved.any()


def test_corridors_of_all_lengths_and_goals_on_both_sides():
    maze = TMaze(500, 3, 6, seed=0)
    assert set(maze.length.tolist()) == {3, 4, 5, 6}
    assert set(maze.goal.tolist()) == {LEFT, RIGHT}
    assert 0.4 < maze.goal.float().mean() < 0.6


def test_no_policy_of_the_present_alone_is_better():
    """All of them: an action for each of the four observations, in mazes of both goals."""
    success, best = reinforcement.best_without_memory()
    reached = []
    for policy in itertools.product(range(3), repeat=4):
        maze = TMaze(2, 3, 3, seed=0)
        maze.goal = torch.tensor([LEFT, RIGHT])
        ended, solved, total = torch.zeros(2, dtype=torch.bool), torch.zeros(2), torch.zeros(2)
        while not ended.all():
            reward, done, right = maze.step(torch.tensor(policy)[maze.observe().argmax(-1)])
            total, solved = total + reward * ~ended, solved + (right & ~ended)
            ended = ended | done
        assert solved.mean() <= success
        reached.append(total.mean().item())
    assert max(reached) == pytest.approx(best, abs=1e-6)


def test_a_memory_solves_it():
    maze, sign = TMaze(50, 2, 5, seed=0), torch.zeros(50, dtype=torch.int64)
    rewards, episodes = 0.0, 0
    for _ in range(40):
        seen = maze.observe().argmax(-1)
        sign = torch.where(seen < CORRIDOR, seen - SIGN_LEFT, sign)
        reward, done, _ = maze.step(torch.where(seen == JUNCTION, sign, WALK))
        rewards, episodes = rewards + reward.sum().item(), episodes + int(done.sum())
    assert rewards == episodes > 200


# ------------------------------------------------------------------------------------------------------------ rollouts


def player_of(options: argparse.Namespace, name: str = reinforcement.WITH) -> reinforcement.Player:
    return reinforcement.Trainee.new(name, options).player


def test_training_reads_what_acting_saw():
    """Two rollouts in a row, episodes across their border: one call gives the scores that were acted on."""
    options = options_of()
    player = player_of(options)
    for number in range(3):
        rollout = reinforcement.play(player, options.steps, options)
        assert rollout.reset[0].all() == (number == 0)
        assert rollout.reset[1:].any()
        scores, _ = player.agent(rollout.observations, rollout.state, rollout.reset)
        chances = torch.distributions.Categorical(logits=scores).log_prob(rollout.actions)
        torch.testing.assert_close(chances, rollout.chances)
        begins = rollout.observations.argmax(-1) < CORRIDOR  # the sign is seen at the entrance, also by who stays there
        assert begins[rollout.reset].all()


def test_advantages(monkeypatch):
    """With a trace of 1 the critic is to say the discounted rewards up to the end of the episode, or of the rollout."""
    options = options_of("--trace", "1", "--discount", "0.9", "--steps", "30")
    player, steps = player_of(options), []
    monkeypatch.setattr(
        player.maze, "step", lambda action, step=player.maze.step: steps.append(step(action)) or steps[-1]
    )
    rollout = reinforcement.play(player, options.steps, options)
    with torch.no_grad():
        following = player.look(player.maze.observe())[1]
    rewards, done = (torch.stack(each) for each in list(zip(*steps, strict=True))[:2])
    assert done.any()
    for t in reversed(range(30)):
        following = rewards[t] + 0.9 * following * ~done[t]
        torch.testing.assert_close(rollout.returns[t], following)


def test_looking_ahead_is_no_step():
    options = options_of()
    player, other = player_of(options), player_of(options)
    torch.manual_seed(3)
    reinforcement.play(player, 5, options)
    reinforcement.play(player, 5, options)
    torch.manual_seed(3)
    reinforcement.play(other, 10, options)
    torch.testing.assert_close(player.state, other.state)
    assert same(player.maze.state_dict(), other.maze.state_dict())


@pytest.mark.parametrize("first", [False, True], ids=["goes on", "all begin"])
def test_three_ways_to_run_a_rollout(first):
    options = options_of("--steps", "25")
    player = player_of(options)
    rollout = reinforcement.play(player, 25, options)
    if not first:
        rollout = reinforcement.play(player, 25, options)
        assert not rollout.reset[0].all()
    rollout.reset[0, :2] = torch.tensor([True, first])
    comparison = reinforcement.compare(rollout, player.agent.lstm, repeats=2)
    assert comparison.error < 1e-4
    assert comparison.seconds.keys() == reinforcement.WAYS.keys()
    assert all(seconds > 0 for seconds in comparison.seconds.values())
    assert comparison.episodes == 4 + int(rollout.reset[1:].sum())


def test_ways_that_differ_are_seen(monkeypatch):
    options = options_of()
    player = player_of(options)
    rollout = reinforcement.play(player, options.steps, options)
    wrong = lambda lstm, rollout: lstm(rollout.observations, rollout.state)[0]  # noqa: E731
    monkeypatch.setattr(reinforcement, "by_segments", wrong)
    monkeypatch.setitem(reinforcement.WAYS, "torch.nn.LSTM, call by call", wrong)
    with pytest.raises(AssertionError, match="expected the same outputs and gradients"):
        reinforcement.compare(rollout, player.agent.lstm, repeats=1)


# ------------------------------------------------------------------------------------------------------------- program


def test_it_runs(run, tmp_path, capsys):
    assert run("--iterations", "3") == 0
    told = capsys.readouterr().out
    for text in ("success rate", "50.0%", "lstmcore.LSTM, reset=", "padded episodes", "outputs and gradients agree"):
        assert text in told
    assert (tmp_path / "out" / "reinforcement.png").stat().st_size > 20_000


def test_it_goes_on_as_if_it_had_never_stopped(run, tmp_path, monkeypatch, capsys):
    assert run("--iterations", "5", out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, reinforcement.Trainee, "iterate", at=5)  # in the third round: two agents take turns
        assert run("--iterations", "5", out="parts") == 130
    assert "stopped after iteration 3; go on with --resume" in capsys.readouterr().out
    assert run("--iterations", "5", "--resume", out="parts") == 0
    assert "resumed after iteration 3" in capsys.readouterr().out
    whole, parts = (state_of(tmp_path / out / "reinforcement.pt") for out in ("whole", "parts"))
    assert same(whole, parts)
    assert not same(whole["state"][reinforcement.WITH], whole["state"][reinforcement.WITHOUT])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--shortest 5", "the shortest corridor, 5 steps, is longer than the longest, 4"),
        ("--batch 0", "at least 1, got 0"),
        ("--discount 1.5", "a number from 0 to 1, got 1.5"),
        ("--resume", "run without --resume first"),
    ],
)
def test_what_it_refuses(arguments, told, run, capsys):
    assert told in refused(lambda each: run(*each), arguments.split(), capsys)


def test_another_training(run, capsys):
    assert run("--iterations", "1") == 0
    told = refused(lambda each: run(*each), ["--resume", "--longest", "5"], capsys)
    assert "longest 4 (now 5)" in told
