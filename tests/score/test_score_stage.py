"""Scoring with the real engine and model: exact probabilities, resume, a killed actor, GPU placement.

Run alone: `pytest tests/score/test_score_stage.py`. The second opinion is the same model in transformers.
"""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from raygr import files, runs
from raygr.prepare.config import PrepareConfig
from raygr.prepare.stage import prepare
from raygr.score.answer_format import aspect_tails
from raygr.score.aspects import load_aspects
from raygr.score.config import ScoreConfig
from raygr.score.default_model import small_model_folder
from raygr.simulate.config import SimulateConfig
from raygr.simulate.stage import simulate

ASPECTS = str(Path(__file__).parents[2] / "configs" / "aspects" / "movies.yaml")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory, local_ray) -> str:
    folder = tmp_path_factory.mktemp("shop")
    simulate(SimulateConfig(output=str(folder / "raw"), shoppers=400))
    prepare(
        PrepareConfig(
            output=str(folder / "prepare"),
            reviews=(str(folder / "raw" / "reviews.jsonl.gz"),),
            metadata=(str(folder / "raw" / "meta.jsonl.gz"),),
        )
    )
    return str(folder / "prepare")


def item_run(data: str, output: Path, **changes) -> ScoreConfig:
    settings = {"data": data, "subjects": "items", "aspects": ASPECTS, "max_subjects": 12, "batch_size": 4}
    return ScoreConfig(output=str(output), **(settings | changes))


def score(config: ScoreConfig) -> pa.Table:
    from raygr.score.stage import score as score_stage

    return files.read_table(files.join(score_stage(config).path, "scores"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    score(item_run(data, folder / "run", store=str(folder / "store")))
    return folder


@pytest.fixture(scope="module")
def language_model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = small_model_folder()
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.inference_mode()
def enumerated(model, tokenizer, prefix_ids: list[int]) -> np.ndarray:
    """P(1..10) from all token sequences of ratings behind `prefix_ids`, each followed by no further digit."""
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    logits = model(torch.tensor([[*prefix_ids, digits[1]]]), logits_to_keep=2).logits[0]
    first, behind_one = logits.double().softmax(-1)
    after_one = behind_one[digits[0]]
    shares = [first[digits[1]] * (1 - after_one), *(first[digit] for digit in digits[2:]), first[digits[1]] * after_one]
    return np.array([float(share) for share in shares]) / float(sum(shares))


def test_expected_ratings_with_exact_ten_equal_enumeration(undisturbed, data, language_model):
    tokenizer, model = language_model
    aspects = load_aspects(ASPECTS)
    tails = aspect_tails(tokenizer, aspects)
    prompts = files.read_table(str(undisturbed / "run" / "prompts")).to_pylist()
    items = files.read_table(f"{data}/items")
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    assert all(titles[row["subject_id"]] in tokenizer.decode(row["prompt_ids"]) for row in prompts)  # nothing is cut
    scores = {row["subject_id"]: row for row in files.read_table(str(undisturbed / "run" / "scores")).to_pylist()}
    for prompt, aspect in itertools.product(prompts[:2], range(0, len(tails), 4)):
        probabilities = enumerated(model, tokenizer, [*prompt["prompt_ids"], *tails[aspect]])
        row = scores[prompt["subject_id"]]
        assert row["expected"][aspect] == pytest.approx(probabilities @ np.arange(1, 11), abs=1e-3)
        near_tie = np.diff(np.sort(probabilities)[-2:])[0] < 1e-4
        assert near_tie or row["ratings"][aspect] == probabilities.argmax() + 1


def test_the_transformers_engine_answers_as_vllm_and_computes_every_token_once(undisturbed, data, tmp_path):
    answers = score(item_run(data, tmp_path / "run", engine="transformers"))
    expected = files.read_table(str(undisturbed / "run" / "scores"))
    assert answers["subject_id"].equals(expected["subject_id"])
    np.testing.assert_allclose(
        np.array(answers["expected"].to_pylist()), np.array(expected["expected"].to_pylist()), atol=2e-3
    )
    prompts = files.read_table(str(tmp_path / "run" / "prompts")).to_pylist()
    tails = sum(len(tail) + 1 for tail in tail_ids())
    shared = [len(set(tokens)) == 1 for tokens in zip(*(row["prompt_ids"] for row in prompts), strict=False)].index(0)
    needed = shared + sum(row["prompt_tokens"] - shared + tails for row in prompts)
    computed = runs.read_run(str(tmp_path / "run"), job="score").counts["engine"]["tokens_computed"]
    assert needed <= computed <= 1.03 * needed


def test_a_score_run_says_what_it_did(undisturbed, data):
    record = runs.read_run(str(undisturbed / "run"), job="score")
    assert record.counts["subjects"] == 12
    assert record.counts["by_reason"] == {"ok": 12}
    engine = record.counts["engine"]
    prompts = files.read_table(str(undisturbed / "run" / "prompts")).to_pylist()
    # each subject's whole blocks once; per aspect the partial block, the tail and one decoded token
    tails = [len(tail) for tail in tail_ids()]
    same = [len(set(tokens)) == 1 for tokens in zip(*(row["prompt_ids"] for row in prompts), strict=False)]
    shared = same.index(False) // 32 * 32
    rests = [row["prompt_tokens"] % 32 for row in prompts]
    own = sum(row["prompt_tokens"] - shared - rest for row, rest in zip(prompts, rests, strict=True))
    needed = own + sum(len(tails) * (rest + 1) + sum(tails) for rest in rests)
    assert 0.98 * needed <= engine["tokens_computed"] <= 1.1 * needed
    counted = record.counts["prompts"]
    assert (counted["count"], counted["cut_subjects"], counted["share_a_prompt_unlike"]) == (12, 0, 0)
    assert files.read_json(str(undisturbed / "run" / "quality.json"))["valid_share"] == 1.0


def tail_ids():
    from transformers import AutoTokenizer

    return aspect_tails(AutoTokenizer.from_pretrained(small_model_folder()), load_aspects(ASPECTS))


def test_a_shared_store_answers_without_the_engine(undisturbed, data, tmp_path):
    config = item_run(data, tmp_path / "again", store=str(undisturbed / "store"), max_subjects=8)
    table = score(config)
    assert runs.read_run(config.output, job="score").counts["engine"]["subjects"] == 0
    before = {row["subject_id"]: row for row in files.read_table(str(undisturbed / "run" / "scores")).to_pylist()}
    assert all(row == before[row["subject_id"]] for row in table.to_pylist())


def scoring_processes() -> list[psutil.Process]:
    # Ray renames its workers; the actor's title holds the class name. Other tests beside these have a Ray of their own.
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ScoringEngine" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_a_killed_actor_changes_nothing(undisturbed, data, tmp_path):
    store = tmp_path / "store"
    killed: list[int] = []

    def kill_after_the_first_batch() -> None:
        deadline = time.monotonic() + 480
        while time.monotonic() < deadline and not killed:
            if list(store.glob("*/*.parquet")):
                for process in scoring_processes():
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
            time.sleep(0.05)

    killer = threading.Thread(target=kill_after_the_first_batch)
    killer.start()
    table = score(item_run(data, tmp_path / "run", store=str(store)))
    killer.join(timeout=1)
    assert killed, "the actor was gone before it could be killed"
    before = {row["subject_id"]: row for row in files.read_table(str(undisturbed / "run" / "scores")).to_pylist()}
    rows = table.to_pylist()
    assert sorted(row["subject_id"] for row in rows) == sorted(before)
    for row in rows:
        np.testing.assert_allclose(row["expected"], before[row["subject_id"]]["expected"], atol=1e-3)
    deadline = time.monotonic() + 30
    while scoring_processes() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not scoring_processes()


def write_random_adapter(folder: Path) -> str:
    """Write an adapter of the small model, in PEFT's format: it moves ratings, but no token of the forced format."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(small_model_folder()))
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    shapes = get_peft_model_state_dict(model, save_embedding_layers=False)
    torch.manual_seed(0)
    folder.mkdir()
    weights = {name: 0.03 * torch.randn(weight.shape) for name, weight in shapes.items()}
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder)
    return str(folder)


def test_forced_completions_are_valid_and_come_from_a_merged_model_that_is_gone(data, tmp_path, language_model):
    """vLLM does not need the merged model's folder after loading."""
    adapter = write_random_adapter(tmp_path / "adapter")
    before = set(Path(tempfile.gettempdir()).glob("raygr-merged-*"))
    config = item_run(data, tmp_path / "run", mode="generate", max_subjects=4, adapter=adapter)
    rows = score(config).to_pylist()
    assert [row["reason"] for row in rows] == ["ok"] * 4
    assert all(1 <= rating <= 10 for row in rows for rating in row["ratings"])
    assert set(Path(tempfile.gettempdir()).glob("raygr-merged-*")) == before
    # vLLM answers with the adapter: as PEFT does, and not as the bare model; the first rating stands behind the first
    # tail, as in probe mode
    tokenizer, bare = language_model
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model_folder()), adapter).eval()
    prompts = {row["subject_id"]: row for row in files.read_table(str(tmp_path / "run" / "prompts")).to_pylist()}
    prefix_ids = [*prompts[rows[0]["subject_id"]]["prompt_ids"], *tail_ids()[0]]
    by_peft, by_bare = (enumerated(model, tokenizer, prefix_ids) @ np.arange(1, 11) for model in (tuned, bare))
    assert rows[0]["expected"][0] == pytest.approx(by_peft, abs=1e-3)
    assert abs(by_peft - by_bare) > 5e-3


def test_users_scored_here_equal_those_of_ray_and_their_prompts_end_before_validation(data, tmp_path):
    users = {"subjects": "users", "max_subjects": 3, "engine": "transformers"}
    table = score(item_run(data, tmp_path / "run", **users, ray="always")).sort_by("subject_id")
    here = score(item_run(data, tmp_path / "here", **users)).sort_by("subject_id")
    answers = ["ratings", "expected"]
    assert here.drop_columns(answers).equals(table.drop_columns(answers))
    np.testing.assert_allclose(here["expected"].to_pylist(), table["expected"].to_pylist(), atol=1e-4)
    rows = {row["subject_id"]: row for row in table.to_pylist()}
    assert len(rows) == 3
    stored = {row["user_id"]: row for row in files.read_table(files.join(data, "users.parquet")).to_pylist()}
    for user_id, row in rows.items():
        assert row["cutoff_position"] == stored[user_id]["cutoff_position"] == stored[user_id]["interactions"] - 3
        assert row["cutoff"] == stored[user_id]["cutoff"]


GPU_PLACEMENT = """
import sys
import numpy as np, ray
from raygr import files
from raygr.score import actors
from raygr.score.config import ScoreConfig
from raygr.score.stage import score
from raygr.score.store import StoredScore

ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False)

class StandIn:
    def __init__(self, settings, store):
        self.settings, self.store, self.gpus = settings, store, ray.get_gpu_ids()
        assert settings.on_gpu

    def __call__(self, batch):
        # the answer is how many GPUs this actor holds
        rating = len(self.gpus)
        answer = StoredScore(ratings=(rating,) * 12, expected=(float(rating),) * 12, reason="ok", completion="")
        self.store.write(list(batch["prompt_sha256"]), [answer] * len(batch["prompt_sha256"]))
        names = ("subjects", "tokens_given", "tokens_computed", "engine_seconds")
        return {name: np.array([len(batch["prompt_sha256"])]) for name in names}

actors.ScoringEngine = StandIn
config = ScoreConfig(output=sys.argv[1], data=sys.argv[2], subjects="items", aspects=sys.argv[3], max_subjects=8,
                     batch_size=2, actors=2, tensor_parallel_size=2)
rows = files.read_table(score(config).path + "/scores").to_pylist()
print("GPUs per actor:", {row["ratings"][0] for row in rows})
"""


def test_actors_claim_tensor_parallel_size_gpus(data, tmp_path):
    script = tmp_path / "placement.py"
    script.write_text(textwrap.dedent(GPU_PLACEMENT))
    command = [sys.executable, str(script), str(tmp_path / "run"), data, ASPECTS]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=480, env=environment)
    assert "GPUs per actor: {2}" in result.stdout, result.stderr[-2000:]
