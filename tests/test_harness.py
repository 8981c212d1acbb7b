"""Tasks of lm-evaluation-harness before and after an edit."""

import json
import math
import sys

import pytest

from rome_fast import Edit, apply_edits
from rome_fast.cli import main
from rome_fast.errors import ArgumentError
from rome_fast.evaluation.harness import TaskChange, TaskScore, task_changes, task_scores
from toys import save_toy, toy_model

# Twenty questions of which a toy knows no answer, so that an edit turns some of the choices.
CITIES = ("Rome", "Paris", "Berlin", "Vienna")
QUESTIONS = [
    {"question": f"{frame} {city}", "choices": [" is", " was", " has"], "gold": (i + j) % 3}
    for i, frame in enumerate(("The city of", "The capital is", "A museum in", "People say that", "In"))
    for j, city in enumerate(CITIES)
]
TASK = """task: rome_fast_cities
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def score(values):
    return TaskScore(sum(values) / len(values), 0.1, dict(enumerate(values)))


def test_the_error_of_a_difference_is_that_of_the_documents_differences():
    before, after = score([1.0, 0.0, 0.0, 1.0]), score([1.0, 1.0, 0.0, 1.0])
    (change,) = task_changes({("t", "acc,none"): after}, {("t", "acc,none"): before})
    # Differences 0, 1, 0, 0: a mean of 1/4, of which the squares sum to 3/4, over n - 1 = 3 and n = 4.
    assert (change.difference, change.error) == (0.25, pytest.approx(math.sqrt(0.75 / 3 / 4)))
    assert change.to_json() == {
        "task": "t",
        "metric": "acc,none",
        "value": 0.75,
        "error": 0.1,
        "value_before": 0.5,
        "error_before": 0.1,
        "difference": 0.25,
        "error_of_difference": change.error,
    }


def test_a_score_alone_and_one_without_documents_have_no_error_of_a_difference():
    (alone,) = task_changes({("t", "acc,none"): score([1.0, 0.0])})
    assert (alone.difference, alone.error) == (None, None)
    assert alone.to_json() == {"task": "t", "metric": "acc,none", "value": 0.5, "error": 0.1}
    without = TaskScore(12.5, None, {})
    change = TaskChange("t", "word_perplexity,none", without, score([1.0, 0.0]))
    assert (change.difference, change.error) == (12.0, None)


def test_without_the_harness_the_extra_is_named(monkeypatch, toy_tokenizers):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ArgumentError, match=r"lm-evaluation-harness is not installed.*rome_fast\[harness\]"):
        task_scores(toy_model("gpt2"), toy_tokenizers[False], ["arc_easy"])


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """The harness, and a folder with a task of our own."""
    found = pytest.importorskip("lm_eval", reason="needs the optional extra `harness`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "tasks" / "cities.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))
    return found


def test_scores_are_those_of_the_harness_on_saved_checkpoints(harness, tmp_path, toy_tokenizers):
    from lm_eval.tasks import TaskManager

    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    save_toy("model", model, tokenizer)
    edit = Edit("The city of {}", "Rome", "Vienna")
    usual = {"tokenizer": tokenizer, "statistics": "identity", "guard": "off", "unconverged": "write", "measure": False}
    result = apply_edits(model, edit, **usual)
    result.delta.save("delta.safetensors")
    save_toy("edited", model, tokenizer)
    (tmp_path / "edits.jsonl").write_text('{"prompt": "The city of {}", "subject": "Rome", "target_new": "Vienna"}\n')

    arguments = ["evaluate", "model", "--delta", "delta.safetensors", "--edits", "edits.jsonl", "--json", "out.json"]
    assert main([*arguments, "--tasks", "rome_fast_cities", "--task-files", "tasks"]) == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())["tasks"]
    wanted = {}
    for name in ("model", "edited"):
        scores = harness.simple_evaluate(
            "hf",
            model_args={"pretrained": name, "dtype": "float32"},
            tasks=["rome_fast_cities"],
            device="cpu",
            task_manager=TaskManager(include_path="tasks"),
        )
        wanted[name] = scores["results"]["rome_fast_cities"]
    assert (found["task"], found["metric"]) == ("rome_fast_cities", "acc,none")
    assert (found["value_before"], found["value"]) == tuple(wanted[n]["acc,none"] for n in ("model", "edited"))
    assert (found["error_before"], found["error"]) == tuple(wanted[n]["acc_stderr,none"] for n in ("model", "edited"))
    # Else nothing would have been compared.
    assert found["value_before"] != found["value"]
    assert found["error_of_difference"] > 0


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["rome_fast_cities", "no_such_task", "--task-files", "tasks"],
            "got 'no_such_task', wanted tasks that the harness",
        ),
        (["rome_fast_cities"], "got 'rome_fast_cities', wanted tasks that the harness has"),
        (["rome_fast_cities", "--task-files", "nowhere"], "task_files: nowhere is no folder"),
    ],
)
def test_what_the_harness_does_not_know_is_said_before_anything_is_measured(arguments, message, tmp_path, capsys):
    (tmp_path / "edits.jsonl").write_text('{"prompt": "The city of {}", "subject": "Rome", "target_new": "Vienna"}\n')
    assert main(["evaluate", "no/model", "--edits", "edits.jsonl", "--tasks", *arguments]) == 2
    assert message in capsys.readouterr().err
