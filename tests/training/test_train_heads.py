"""Training on a language that is known: what is learned, that it stands at the right place, and that nothing is lost.

pytest tests/training/test_train_heads.py
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.model.drafting.files import load_heads
from medusa_serve.training import train_heads
from medusa_serve.training.batches import make_batch
from medusa_serve.training.loss import soft_loss
from medusa_serve.training.optimizer_step import GROW, MAX_SKIPPED, Stepper, schedule
from medusa_serve.training.teacher import Teacher, draft_vocabulary
from medusa_serve.training.train_config import TrainConfig
from medusa_serve.training.train_heads import Run, train
from tests.tiny import tiny_model
from tests.training.toy import HIDDEN, VOCAB, Toy, pack, toy_answers

FAMILIES = ("medusa", "sequential")


def config(out, family="sequential", **options):
    small = {"steps": 150, "num_heads": 3, "inner": 32, "readout": 16, "batch_rows": 128, "lr": 5e-2, "held_out": 6}
    return TrainConfig(family=family, out=str(out / "heads"), **{**small, "draft_vocab": 0, **options})


def drafts(heads, toy, token, depths):
    """What the runner would draft after a step whose last accepted node holds `token` (greedy)."""
    hidden = toy.embedding(toy.follow[torch.tensor([token])])
    pending = toy.follow[token]
    ids = torch.arange(VOCAB) if heads.token_map is None else heads.token_map
    if heads.family == "medusa":
        return ids[heads.logits(hidden)[0].argmax(dim=-1)].tolist()
    state, out = heads.start(hidden, pending[None]), []
    for _ in range(depths):
        out.append(int(ids[heads.logits(state)[0].argmax()]))
        state = heads.advance(state, torch.tensor([out[-1]]))
    return out


def share_right(heads, toy, depths=3):
    """Share of drafted tokens that are x_{t+2}, x_{t+3}, … when x_t is the last accepted token."""
    right = sum(
        mine == true
        for token in range(VOCAB)
        for mine, true in zip(drafts(heads, toy, token, depths), toy.speak(token, depths + 2)[2:], strict=True)
    )
    return right / (VOCAB * depths)


def load(out):
    toy = Toy()
    return load_heads(out / "heads", hidden_size=HIDDEN, vocab_size=VOCAB, dtype=torch.float32, base_model=toy)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_learn_the_language_at_the_place_where_the_runner_asks(tmp_path, family):
    toy, seen = Toy(), []
    measured = train(toy, toy_answers(toy), config(tmp_path, family, report_seconds=0), progress=seen.append)
    heads, info = load(tmp_path)
    assert share_right(heads, toy) > 0.95
    assert seen[-1].loss < 0.2 * seen[0].loss
    assert min(measured.top1) > 0.95
    assert measured.greedy[4] > 3.0  # three depths, all right: four tokens a step but at the ends
    assert info.family == family
    assert info.ranks == measured.ranks or np.allclose(info.ranks, measured.ranks, atol=1e-5)
    assert len(info.tau) == 3
    assert max(info.tau) < 1  # right more often than the soft labels say
    assert info.noise_tau is None  # no sampled answers
    assert info.provenance["steps"] == 150
    assert not (tmp_path / "heads.training").exists()


@pytest.mark.parametrize("warmth", [0.7, 1.0])
def test_both_temperatures_are_fitted_and_saved(tmp_path, warmth):
    """noise_tau on answers near T = 0.7, or on those that were sampled otherwise where there are no such."""
    toy = Toy()
    answers = toy_answers(toy)
    answers = replace(answers, temperature=np.where(answers.index % 2, warmth, 0).astype(np.float32))
    measured = train(toy, answers, config(tmp_path, steps=20, held_out=60))
    info = load(tmp_path)[1]
    assert (info.tau, info.noise_tau) == (measured.tau, measured.noise_tau)
    assert len(info.tau) == len(info.noise_tau) == 3
    assert info.noise_tau != info.tau
    assert bool(measured.sampled) == (warmth == 0.7)  # the forecast is for 0.7 alone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_teacher_one_position_off_is_seen(tmp_path, family, shift, monkeypatch):
    def shifted(features, teacher, place, *args, **options):
        return soft_loss(features, teacher.roll(shift, dims=0), place, *args, **options)

    monkeypatch.setattr(train_heads, "soft_loss", shifted)
    toy = Toy()
    train(toy, toy_answers(toy), config(tmp_path, family))
    assert share_right(load(tmp_path)[0], toy) < 0.3


def test_a_draft_vocabulary_holds_the_most_frequent_answer_tokens(tmp_path):
    toy = Toy()
    answers = pack([(0, 0, 0.0, [9, 9, 9, 9], [5, 5, 7]), (1, 0, 0.0, [9], [7, 5, 3])], VOCAB)
    assert draft_vocabulary(answers, 2).tolist() == [5, 7]
    assert draft_vocabulary(answers, VOCAB) is None
    train(toy, toy_answers(toy), config(tmp_path, draft_vocab=20))
    heads, info = load(tmp_path)
    assert info.token_map == 20
    assert share_right(heads, toy) > 0.7  # three of the tokens cannot be drafted


def test_the_rows_of_a_batch_are_the_states_the_runner_drafts_from():
    answers = pack([(0, 0, 0.0, [1, 2, 3], [4, 5, 6, 7]), (1, 0, 0.0, [8], [9, 10])], VOCAB)
    batch = make_batch(answers, np.array([0, 1]))
    flat = batch.ids.flatten()
    assert flat[batch.at].tolist() == [3, 4, 5, 8]  # the prompt's last token first; none for the answer's last two
    assert batch.tokens(2).tolist()[:3] == [[4, 5], [5, 6], [6, 7]]  # pending, then the true draft
    assert batch.tokens(2, first=2).tolist()[:3] == [[5, 6], [6, 7], [7, 8]]  # 8 stands behind the end …
    assert batch.left.tolist() == [3, 2, 1, 1]  # … and does not count
    assert batch.offset.tolist() == [0, 1, 2, 0]


def test_no_row_learns_from_the_prompt():
    """Other prompts of the same length, the same answers and hidden states: the same loss and gradients."""
    toy = Toy()
    teacher = Teacher(toy)
    rows = [(0, 0, 0.0, [1, 2, 3], [4, 5, 6, 7]), (1, 0, 0.0, [8, 3], [9, 10, 11])]
    other = [(0, 0, 0.0, [7, 9, 3], [4, 5, 6, 7]), (1, 0, 0.0, [2, 3], [9, 10, 11])]
    found = []
    for these in (rows, other):
        batch = make_batch(pack(these, VOCAB), np.array([0, 1]))
        hidden, last = teacher.hidden(batch.ids)
        loss = soft_loss(hidden[batch.at][:, None].expand(-1, 3, -1), last[batch.at + 1], batch.offset,
                         teacher.output(None), torch.ones(3))  # fmt: skip
        found.append(loss)
    assert torch.equal(found[0].total, found[1].total)
    assert torch.equal(found[0].grad, found[1].grad)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, family, monkeypatch):
    toy = Toy()
    answers = toy_answers(toy)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = train(toy, answers, config(tmp_path / "a", family, steps=30))
    for stop in (7, 19):  # inside the first epoch and behind it

        def learn(self, batch, stop=stop, whole=Run.learn):
            if self.step == stop:
                raise Interrupt
            whole(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "learn", learn)
            with pytest.raises(Interrupt):
                train(toy, answers, config(tmp_path / "b", family, steps=30))
        assert not (tmp_path / "b" / "heads").exists()
        assert (tmp_path / "b" / "heads.training" / "heads" / "heads.safetensors").is_file()
    notes = []
    resumed = train(toy, answers, config(tmp_path / "b", family, steps=30), note=notes.append)
    assert "step 19" in notes[0]
    assert resumed.top5 == whole.top5
    mine, theirs = (
        load_heads(tmp_path / name / "heads", hidden_size=HIDDEN, vocab_size=VOCAB, dtype=torch.float32, base_model=toy)
        for name in "ab"
    )
    for name, tensor in mine[0].state_dict().items():
        assert torch.equal(tensor, theirs[0].state_dict()[name]), name


def test_another_run_in_the_way_is_refused(tmp_path, monkeypatch):
    toy = Toy()
    answers = toy_answers(toy)
    run = Run(Teacher(toy), answers, config(tmp_path), "toy")
    run.step = 1
    run.save()
    with pytest.raises(LoadError, match="holds a run with num_heads 3, asked is 2"):
        train(toy, answers, config(tmp_path, num_heads=2))
    run.state_path.write_bytes(b"no state")
    with pytest.raises(LoadError, match="damaged"):
        train(toy, answers, config(tmp_path))


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    (tmp_path / "heads").mkdir()
    with pytest.raises(LoadError, match="exists; choose another"):
        train(None, None, config(tmp_path))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LoadError, match="cannot be made: Not a directory|cannot be made: File exists"):
        train(None, None, config(tmp_path / "file"))


def test_answers_of_another_vocabulary_are_refused(tmp_path):
    toy = Toy()
    with pytest.raises(LoadError, match="vocabulary of 97, the model has 23"):
        train(toy, replace(toy_answers(toy), vocab_size=97), config(tmp_path))


def test_too_few_answers(tmp_path):
    toy = Toy()
    with pytest.raises(LoadError, match="too few answers"):
        train(toy, toy_answers(toy, 1), config(tmp_path))


def test_steps_without_finite_gradients_are_skipped_and_counted(tmp_path, monkeypatch):
    toy, calls = Toy(), []

    def sometimes(features, *args, **options):
        calls.append(1)
        loss = soft_loss(features, *args, **options)
        return loss._replace(grad=loss.grad * torch.nan) if len(calls) % 5 == 0 else loss

    monkeypatch.setattr(train_heads, "soft_loss", sometimes)
    seen = []
    train(toy, toy_answers(toy), config(tmp_path, report_seconds=0), progress=seen.append)
    assert seen[-1].skipped == 30
    assert share_right(load(tmp_path)[0], toy) > 0.9


def test_a_run_without_any_finite_step_ends_with_an_error(tmp_path, monkeypatch):
    def never(features, *args, **options):
        loss = soft_loss(features, *args, **options)
        return loss._replace(grad=loss.grad * torch.inf)

    monkeypatch.setattr(train_heads, "soft_loss", never)
    toy = Toy()
    with pytest.raises(LoadError, match="no finite numbers"):
        train(toy, toy_answers(toy), config(tmp_path))


def test_a_bad_step_changes_nothing_and_halves_the_scale(tmp_path):
    heads = Run(Teacher(Toy()), toy_answers(Toy()), config(tmp_path), "toy").heads
    stepper = Stepper(heads, 0.1, 0.01, torch.float16)

    def step(value):
        for parameter in heads.parameters():
            parameter.grad = torch.full_like(parameter, value)
        stepper.step(0.1, torch.tensor(2.0))

    def everything():
        moments = [tensor for state in stepper.adamw.state.values() for tensor in state.values()]
        moments += stepper.muon.moments
        assert moments
        return [tensor.clone() for tensor in (*heads.parameters(), *moments)]

    step(1.0)
    before = everything()
    for value in (torch.nan, torch.inf, -torch.inf):
        step(value)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert (stepper.skipped, stepper.bad, stepper.good) == (3, 3, 0)
    assert stepper.scale == 2.0**9
    stepper.good.fill_(GROW - 1)
    step(1.0)
    assert (stepper.bad, stepper.scale, stepper.loss) == (0, 2.0**10, 2.0)
    assert not torch.equal(before[0], everything()[0])
    other = Stepper(heads, 0.1, 0.01, torch.float16)
    other.load(stepper.state())
    assert (other.skipped, other.scale, other.loss) == (3, 2.0**10, 2.0)
    stepper.check()
    stepper.bad.fill_(MAX_SKIPPED)
    with pytest.raises(LoadError, match="50 training steps in a row"):
        stepper.check()


def test_muon_learns_each_matrix_of_a_stack_at_the_same_rate(tmp_path):
    heads = Run(Teacher(Toy()), toy_answers(Toy()), config(tmp_path, "medusa"), "toy").heads
    stepper, before = Stepper(heads, 0.1, 0.0, torch.float32), heads.weight.detach().clone()
    for parameter in heads.parameters():
        parameter.grad = torch.zeros(parameter.shape)
    for head, size in enumerate((1.0, 0.1, 0.01)):
        heads.weight.grad[0, head] = size * torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0]
    stepper.step(0.1, torch.tensor(1.0))
    for matrix in (heads.weight.detach() - before).flatten(0, 1):
        values = torch.linalg.svdvals(matrix) / (0.1 * 0.2 * HIDDEN**0.5)
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.5


@pytest.mark.parametrize(("size", "scale"), [(0.01, 1.0), (5.0, 1.0), (0.01, 4096.0), (5.0, 4096.0)])
def test_a_step_is_muon_and_adamw_on_clipped_and_unscaled_gradients(tmp_path, size, scale):
    mine, theirs = (Run(Teacher(Toy()), toy_answers(Toy()), config(tmp_path), "toy").heads for _ in range(2))
    stepper = Stepper(mine, 0.1, 0.01, torch.float32)
    stepper.scale.fill_(scale)
    flat, matrices = ([p for p in theirs.parameters() if (p.dim() < 2) == vector] for vector in (True, False))
    adamw = torch.optim.AdamW(flat, lr=0.1, weight_decay=0.0, betas=(0.9, 0.95), fused=False)
    muon = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            b.grad = size * torch.randn(b.shape, generator=random)
            a.grad = scale * b.grad
        stepper.step(0.1, torch.tensor(torch.nan))
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        muon.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        # Muon orthogonalises in bfloat16: a rounding of its input is seen in its output
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 if a.dim() < 2 else 0.02)
    assert stepper.loss.isnan()


def test_time_before_the_first_step_does_not_warm_up_the_learning_rate(tmp_path):
    run = Run(Teacher(Toy()), toy_answers(Toy()), config(tmp_path, steps=None, minutes=1.0), "toy")
    run.elapsed = run.prepared = 30.0
    assert run.fraction == 0
    run.elapsed = 45.0
    assert run.fraction == 0.5
    run.elapsed = 60.0
    assert run.fraction == 1


def test_out_of_memory_names_the_size_that_fits(tmp_path, monkeypatch):
    gradients = Run.gradients

    def limited(self, numbers, **options):
        if self.answers.answer_len[numbers].sum() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradients(self, numbers, **options)

    monkeypatch.setattr(Run, "gradients", limited)
    toy, notes = Toy(), []
    with pytest.raises(LoadError, match="128 answer rows does not fit into memory; batch_rows 32 does"):
        train(toy, toy_answers(toy), config(tmp_path, max_length=32))
    train(toy, toy_answers(toy), config(tmp_path, max_length=32, batch_rows=None, steps=2), note=notes.append)
    assert notes[0] == "steps of 32 answer rows, because 256 do not fit into memory"


def test_memory_that_runs_out_later_names_a_size_and_loses_nothing(tmp_path, monkeypatch):
    toy = Toy()

    def learn(self, numbers, whole=Run.learn):
        if self.step == 7 and self.batch_rows > 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        whole(self, numbers)

    monkeypatch.setattr(Run, "learn", learn)
    with pytest.raises(LoadError, match="128 answer rows .* batch_rows 64 should.* goes on from step 7") as caught:
        train(toy, toy_answers(toy), config(tmp_path, steps=12))
    assert "\n" not in caught.value.message
    notes = []
    measured = train(toy, toy_answers(toy), config(tmp_path, steps=12, batch_rows=64), note=notes.append)
    assert "going on from step 7" in notes[0]
    assert (measured.provenance["steps"], measured.provenance["batch_rows"]) == (12, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_trains_fp32_heads(tmp_path, dtype):
    toy = Toy(dtype=dtype)
    run = Run(Teacher(toy), toy_answers(toy), config(tmp_path), "toy")
    assert {parameter.dtype for parameter in run.heads.parameters()} == {torch.float32}
    for begin in (run.resume, run.fit, run.fill):
        begin(print)
    run.loop(lambda report: None)
    assert run.stepper.skipped == 0
    assert share_right(run.heads, toy) > 0.95
    assert run.stepper.scale == (2.0**12 if dtype == torch.float16 else 1.0)


def test_a_real_architecture_trains_and_its_heads_load(tmp_path):
    model = tiny_model("llama", torch.float32)
    answers = pack([(i, i, 0.0, [3 + i, 4], list(range(5 + i, 30 + i))) for i in range(40)], 97)
    measured = train(
        model, answers, config(tmp_path, steps=5, hidden_inputs=(-1, 1), draft_vocab=50), model_name="tiny"
    )
    heads, info = load_heads(tmp_path / "heads", hidden_size=32, vocab_size=97, dtype=torch.float32, base_model=model)
    assert (info.hidden_inputs, info.token_map, heads.hidden_inputs) == ((-1, 1), 50, 2)
    assert json.loads((tmp_path / "heads" / "config.json").read_text())["provenance"]["base"] == "tiny"
    assert measured.provenance["answer_tokens"] == 1000


def test_a_report_that_is_interrupted_is_made_by_the_same_command_again(tmp_path, monkeypatch):
    toy = Toy()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("medusa_serve.training.finish.engine_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(toy, toy_answers(toy), config(tmp_path, steps=3))
    assert not (tmp_path / "heads").exists()
    interim = load_heads(
        tmp_path / "heads.training" / "heads", hidden_size=HIDDEN, vocab_size=VOCAB, dtype=torch.float32
    )
    assert interim[1].tau  # calibrated
    assert train(toy, toy_answers(toy), config(tmp_path, steps=3)).provenance["steps"] == 3
    assert (tmp_path / "heads" / "heads.safetensors").is_file()


@pytest.mark.parametrize(
    ("field", "value"),
    [("family", "hydra"), ("out", " "), ("minutes", 3), ("steps", None), ("num_heads", 0), ("lr", 0.0), ("decay", -1),
     ("batch_rows", 0), ("keep_gib", -1), ("draft_vocab", -1), ("inner", 0)],
)  # fmt: skip
def test_nonsense_is_refused_by_name(tmp_path, field, value):
    good = {"family": "sequential", "out": str(tmp_path / "x"), "steps": 3}
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig(**{**good, field: value})
    assert caught.value.param == ("minutes" if field == "steps" else field)


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(x / 100, 0.1) for x in range(101)]
    assert rates.index(max(rates)) == 10
    assert rates[0] == pytest.approx(0.001)
    assert rates[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
