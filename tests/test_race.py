"""Models that train in turns: who is next, what a kill changes, what the curves say."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerState, set_seed

from mor import MoRConfig
from mor.training import race as race_module
from mor.training.arguments import training_arguments
from mor.training.race import Entrant, check_same_race, finished, race
from mor.training.race_results import CurvePoint, at_median_speed, curve_of, result_of, table
from mor.training.trainer import MoRTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

SEQ_LEN = 8
DENSE = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(1, 32, (16, SEQ_LEN), generator=torch.Generator().manual_seed(0))
]


def entrants(folder, steps=(6, 4)):
    def entrant(name, config, steps):
        def build():
            set_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            arguments = training_arguments(
                folder / name, steps=steps, batch_size=2, log_every=99, eval_every=99,
                save_every=99, disable_tqdm=True,
            )  # fmt: skip
            return MoRTrainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:2])

        return Entrant(name, folder / name, steps, build)

    routed = MoRConfig(base_config=DENSE, num_recursions=2)
    return [entrant("mor", routed, steps[0]), entrant("dense", DENSE, steps[1])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    turns = []
    folder = tmp_path_factory.mktemp("race")
    models = entrants(folder)
    race(models, 2, after_turn=lambda one, state: turns.append((one.name, state.global_step)))
    return [finished(one) for one in models], turns


def test_models_take_turns_of_equal_shares_of_their_steps(whole):
    assert whole[1] == [("mor", 3), ("dense", 2), ("mor", 6), ("dense", 4)]


def test_a_race_that_was_killed_ends_as_the_one_that_was_not(whole, tmp_path, monkeypatch):
    take_turn, taken = race_module._take_turn, []

    def killed_in_the_third(entrant, end):
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(entrant.name)
        return take_turn(entrant, end)

    monkeypatch.setattr(race_module, "_take_turn", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        race(entrants(tmp_path), 2)
    monkeypatch.setattr(race_module, "_take_turn", take_turn)
    models = entrants(tmp_path)
    with pytest.raises(ValueError, match="finished: expected a trained mor"):
        finished(models[0])
    race(models, 2)
    for resumed, trainer in zip(map(finished, models), whole[0], strict=True):
        mine, theirs = (t.model.state_dict() for t in (resumed, trainer))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        losses = [(p.flops, p.loss) for p in curve_of(resumed.state, 16)]
        assert losses == [(p.flops, p.loss) for p in curve_of(trainer.state, 16)]


def test_turns_do_not_change_the_training(whole, tmp_path):
    alone = entrants(tmp_path)[0]
    race([alone], 1)
    weights = finished(alone).model.state_dict()
    turned = whole[0][0].model.state_dict()
    assert all(torch.equal(weights[name], turned[name]) for name in weights)


def test_more_turns_than_steps_are_a_turn_for_each_step(tmp_path):
    turns = []
    race(entrants(tmp_path, (2, 1))[:1], 5, after_turn=lambda _, state: turns.append(state))
    assert [state.global_step for state in turns] == [1, 2]


def test_results_of_a_trainer(whole):
    results = [result_of(name, t, SEQ_LEN) for name, t in zip("md", whole[0], strict=True)]
    assert [result.train_tokens for result in results] == [6 * 16, 4 * 16]
    assert results[0].parameters < results[1].parameters
    assert all(len(result.curve) == 2 and result.tokens_per_second > 0 for result in results)
    assert f"{results[1].validation_loss:.3f} nats/token" in table(results)


def test_time_of_a_curve_is_that_of_training():
    state = TrainerState()
    state.log_history = [
        {"step": 2, "loss": 3.0, "tokens_per_second": 10.0, "total_flos": 5},
        {"step": 2, "eval_loss": 2.0, "eval_runtime": 100.0},
        {"step": 6, "loss": 3.0, "tokens_per_second": 40.0, "total_flos": 15},
        {"step": 6, "eval_loss": 1.0},
    ]
    assert curve_of(state, 10) == [CurvePoint(5, 2.0, 2.0), CurvePoint(15, 3.0, 1.0)]


def test_one_stalled_turn_does_not_lengthen_the_time_at_the_median_speed(whole):
    result = result_of("m", whole[0][0], SEQ_LEN)
    curve = [CurvePoint(10, 1.0, 3.0), CurvePoint(20, 60.0, 2.0)]
    stalled = replace(result, curve=curve, train_flops=20, train_tokens=40, tokens_per_second=20.0)
    assert at_median_speed(stalled) == [CurvePoint(10, 1.0, 3.0), CurvePoint(20, 2.0, 2.0)]


def test_a_race_without_turns_and_two_models_in_one_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least 1 turn, got 0"):
        race(entrants(tmp_path), 0)
    with pytest.raises(ValueError, match="a folder for each entrant, got one twice"):
        race([*entrants(tmp_path), *entrants(tmp_path)], 1)


def test_a_folder_keeps_to_one_race(tmp_path):
    check_same_race(tmp_path, {"seed": 0, "sizes": (1, 2)})
    check_same_race(tmp_path, {"seed": 0, "sizes": (1, 2)})
    with pytest.raises(ValueError, match="unfinished race with seed 0, not 1: go on with that"):
        check_same_race(tmp_path, {"seed": 1, "sizes": (1, 2)})
