"""Losses of a set equal brute-force sums, on one rank and on two."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fvlm.data.batch import LoadedSample, collate
from fvlm.data.plan import Capacities
from fvlm.evaluate.multiple_choice import multiple_choice
from fvlm.evaluate.validation import evaluate_losses, label_samples, time_mode
from fvlm.evaluate.writing import Writer
from fvlm.model import build_model, tiny_config
from tests.evaluate.reference import answer_logprob, answer_places

SOURCES = ("a", "b", "unused")
ROOM = Capacities(frames=24, tokens=512, visual=32, coarse=32, samples=8, labels=200, max_seqlen=128)


@pytest.fixture(scope="module")
def samples(make_item, tokenizer, presentation):
    metas = [
        (1, "video", 4, 0, "ring moon bar"),
        (2, "video", 2, 1, "There is a blue ring in the top left corner."),
        (3, "image", 1, 0, "moon"),
        (4, "text", 0, 1, "yes, it is"),
        (5, "images", 3, 0, "bar"),
    ]
    found = []
    for seed, kind, frames, source, assistant in metas:
        item = make_item(seed, kind, frames, user="What is seen?", assistant=assistant)
        text = presentation.segments(item.meta, tokenizer)
        found.append((item, LoadedSample(key=str(seed), segments=text, frames=item.read_frames(), source_id=source)))
    return found


def steps(samples, *groups) -> list[SimpleNamespace]:
    """Loader steps: each group of sample numbers is a step of one pack."""
    packs = [collate([samples[i][1] for i in group], ROOM, "ce_answer", 56) for group in groups]
    return [SimpleNamespace(batches=[pack], skipped=Counter()) for pack in packs]


@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine", "autoregressive"])
def test_losses_equal_brute_force(model, samples, mode):
    report = evaluate_losses(model, steps(samples, [0, 1, 2], [3, 4], []), mode, source_names=SOURCES)
    sums, counts = Counter(), Counter()
    for item, sample in samples:
        sums[sample.source_id] -= answer_logprob(model, item, sample.segments, mode=mode)
        counts[sample.source_id] += len(answer_places(sample.segments))
    assert report.loss == pytest.approx(sum(sums.values()) / sum(counts.values()), abs=1e-5)
    assert report.loss_by_source == pytest.approx({SOURCES[i]: sums[i] / counts[i] for i in sums}, abs=1e-5)
    assert (report.labels, report.samples) == (sum(counts.values()), len(samples))
    assert report.composition["a"] == {"samples": 3, "labels": counts[0], "share": 0.6}
    assert set(report.composition) == {"a", "b"}


def test_coarse_loss_beside_the_fine_one(model, samples):
    fine = evaluate_losses(model, steps(samples, [0, 1], [2, 3, 4]), "coarse_fine", source_names=SOURCES)
    coarse = evaluate_losses(model, steps(samples, [0, 1, 2, 3, 4]), "coarse_only", source_names=SOURCES)
    assert fine.loss_coarse == pytest.approx(coarse.loss, rel=1e-6)
    assert fine.coarse_by_source == pytest.approx(coarse.loss_by_source, rel=1e-6)
    assert fine.loss_ratio == pytest.approx(fine.loss / coarse.loss, rel=1e-6)
    assert (coarse.loss_fine, coarse.loss_ratio) == (None, None)
    assert coarse.loss_coarse == coarse.loss
    assert set(coarse.metrics()) == {"val_loss", "loss_coarse", "attention_entropy", "val_loss/a", "val_loss/b"}


@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine", "autoregressive"])
def test_entropy_is_that_of_the_real_queries(model, samples, mode):
    loader = steps(samples, [0, 1, 2], [4])
    report = evaluate_losses(model, loader, mode, source_names=SOURCES)
    entropies = []
    for step in loader:
        batch = step.batches[0]
        maps = model.attention_maps(batch, mode=mode).double()
        entropy = -torch.xlogy(maps, maps).sum(-1).mean((1, 2))
        entropies += entropy[batch.visual_index < len(batch.token_ids)].tolist()
    assert len(entropies) == 4 + 2 + 3 + 3
    assert report.attention_entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)


def test_blank_frames_are_mid_grey(model, samples):
    loader = steps(samples, [0, 1, 2, 3, 4])
    grey = replace(loader[0].batches[0], frames=torch.full_like(loader[0].batches[0].frames, 128))
    with torch.no_grad():
        out = model(batch=grey)
    expected = float(out.loss_sum / out.num_labels)
    before = loader[0].batches[0].frames.clone()
    report = evaluate_losses(model, loader, blank=True, source_names=SOURCES)
    assert report.loss == pytest.approx(expected, rel=1e-6)
    assert report.blank
    assert torch.equal(loader[0].batches[0].frames, before), "the caller's frames were changed"
    loader[0].batches[0] = replace(grey, frames=grey.frames.float())
    with pytest.raises(ValueError, match="expects uint8 frames"):
        evaluate_losses(model, loader, blank=True, source_names=SOURCES)


def test_mode_of_the_model_comes_back(model, samples):
    model.train()
    evaluate_losses(model, steps(samples, [0]), source_names=SOURCES)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    time_mode(model, steps(samples, [0]), "coarse_only")
    assert not model.training


def test_baseline_has_no_coarse_loss_and_no_entropy(samples, tokenizer):
    torch.manual_seed(0)
    baseline = build_model(tiny_config(len(tokenizer), architecture="multi_token", grid=1)).eval()
    packs = [collate([samples[i][1] for i in (0, 1)], ROOM, "ce_answer", 56, grid=1)]
    report = evaluate_losses(baseline, [SimpleNamespace(batches=packs, skipped=Counter())], source_names=SOURCES)
    assert (report.loss_coarse, report.loss_ratio, report.attention_entropy) == (None, None, None)
    assert report.loss > 0


def test_seconds_are_measured_by_sample(model, samples):
    seconds, count = time_mode(model, steps(samples, [0, 1], [2, 3], [4]), "coarse_only", most_batches=2)
    assert count == 4
    assert 0 < seconds < 10


def test_empty_sets_and_foreign_sources_are_errors(model, samples):
    with pytest.raises(ValueError, match="no batch"):
        evaluate_losses(model, [], source_names=SOURCES)
    with pytest.raises(ValueError, match="no batch"):
        time_mode(model, [], "coarse_fine")
    with pytest.raises(ValueError, match="no loss token"):
        evaluate_losses(model, steps(samples, []), source_names=SOURCES)
    with pytest.raises(ValueError, match="do not fit 1 source_names"):
        evaluate_losses(model, steps(samples, [0, 1]), source_names=SOURCES[:1])


def test_labels_belong_to_their_samples(samples):
    batch = steps(samples, [3, 0, 2])[0].batches[0]
    owners = label_samples(batch)[batch.labels >= 0].tolist()
    expected = [place for place, i in enumerate((3, 0, 2)) for _ in answer_places(samples[i][1].segments)]
    assert owners == expected


def _on_rank(rank: int, port: int, model, loader, task, writer, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    report = evaluate_losses(model, loader[rank::2], source_names=SOURCES, intervals=True)
    said = writer.write(model, [question.item for question in task.questions], "cpu", "coarse_fine")
    answers, skipped = task.run(model, device="cpu", token_budget=400)
    results[rank] = (report.as_dict(), [answer.as_dict() for answer in answers], dict(skipped), said)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(model, samples, questions, tokenizer, presentation, unused_port):
    loader = steps(samples, [0, 1], [2], [3], [4])
    loader[1].skipped["bad_jpeg"] = 2
    task = multiple_choice(questions, tokenizer, presentation)
    expected = evaluate_losses(model, loader, source_names=SOURCES, intervals=True).as_dict()
    writer = Writer(tokenizer=tokenizer, presentation=presentation, new_tokens=5, token_budget=150)
    written = writer.write(model, questions, "cpu", "coarse_fine")
    answers = [answer.as_dict() for answer in task.run(model, device="cpu", token_budget=400)[0]]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_on_rank, args=(unused_port, model, loader, task, writer, results), nprocs=2)
        by_rank = [results[rank] for rank in range(2)]
    expected.pop("seconds_per_sample")
    for losses, found, skipped, said in by_rank:
        assert (found, skipped) == (answers, {})
        assert said == written
        assert losses["skipped"] == {"bad_jpeg": 2}
        for name, value in expected.items():
            close = isinstance(value, float) or name == "interval"
            assert losses[name] == (pytest.approx(value, rel=1e-12) if close else value), name
