"""`python -m jaxembed.evaluate --model M --benchmark "MTEB(eng, v1)"`: scores on mteb's tasks and on local files."""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxembed.__main__ import run_command
from jaxembed.config import TextFormatConfig
from jaxembed.config_file import read_config
from jaxembed.errors import InputError

if TYPE_CHECKING:
    from jaxembed.evaluation.scores import Run
    from jaxembed.evaluation.tables import Table


logger = logging.getLogger(__name__)


class EvaluateConfig(BaseModel):
    """What a file for `--config` holds; the options of the command line stand over it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str | None = Field(default=None, description="directory of a model, or hub id")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id")
    name: str | None = Field(default=None, description="of the model in tables; null = its hub id or directory")
    text_format: TextFormatConfig | None = Field(default=None, description="instead of the model's own")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="of the computation")
    fsdp: int = Field(default=1, ge=1, description="devices of this machine over which the weights are split")
    batch_size: int | None = Field(
        default=None, ge=1, description="rows of the longest length at once; null = what suits the devices"
    )
    normalize: bool | None = Field(default=None, description="to unit length; null = as the text format has it")
    truncate_dim: int | None = Field(default=None, ge=1, description="dimensions kept; null = all")
    instructions: dict[str, str] = Field(
        default_factory=dict,
        description="text between role prefix and text, by mteb's keys: SciFact-query, SciFact, Retrieval-query, "
        "Retrieval, query, …",
    )
    instruction_template: str | None = Field(
        default=None, description='with "{instruction}", for the prompts that mteb has for its tasks; null = not used'
    )
    symmetric: list[str] = Field(
        default_factory=list, description="names or types of tasks whose documents are read as queries too"
    )
    tasks: list[str] = Field(default_factory=list, description="local tasks, [KIND:]PATH[,option=value…]")
    mteb_tasks: list[str] = Field(default_factory=list, description="names of tasks of mteb's")
    benchmark: str | None = Field(default=None, description="name of a benchmark of mteb's")
    published: dict[str, float] = Field(
        default_factory=dict, description="scores in percent, by task, to be printed beside those found"
    )
    output: str | None = Field(
        default=None,
        description="folder of the report; null = evaluations/NAME, or NAME@REVISION where that has another's report",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, evaluates, prints the scores; returns the exit status: 1 if a task had to be left out."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "datasets", "httpx", "jax", "mteb", "sentence_transformers", "jaxembed.embedder"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if "://" in (arguments.output or ""):
        raise InputError(f"--output {arguments.output}: a report is written to a local directory")
    if arguments.compare:
        return _compare(arguments.compare, arguments.output)
    config = _config(arguments)
    if config.model is None:
        raise InputError("--model: expected a directory or a hub id, found neither this option nor model in a config")

    from jaxembed.evaluation.task_reader import parse_task

    tasks: list[Any] = [parse_task(task) for task in config.tasks]

    from jaxembed.embedder import Embedder  # these take seconds to import
    from jaxembed.evaluation import MTEBModel, benchmark_tasks, evaluate, named_tasks
    from jaxembed.evaluation.mteb_model import model_name
    from jaxembed.evaluation.report import scores_table
    from jaxembed.evaluation.run import check_tasks
    from jaxembed.sharding import local_mesh
    from jaxembed.text.format import read_text_format_file

    name = config.name or model_name(config.model)
    try:
        output = Path(config.output or f"evaluations/{name.replace('/', '__')}").expanduser()
    except RuntimeError as error:
        raise InputError(f"--output {config.output}: no such folder: {error}") from None
    tasks += named_tasks(config.mteb_tasks)
    tasks += [] if config.benchmark is None else benchmark_tasks(config.benchmark)
    names = list(check_tasks(tasks))
    if unknown := sorted(config.published.keys() - set(names)):
        raise InputError(f"published: {unknown[0]} is none of the tasks: {', '.join(names)}")
    text_format = None if config.text_format is None else config.text_format.model_dump()
    if arguments.format_file is not None:
        text_format = read_text_format_file(arguments.format_file)
    embedder = Embedder.from_pretrained(
        config.model,
        text_format=text_format,
        dtype=config.dtype,
        mesh=local_mesh(config.fsdp),
        revision=config.revision,
    )
    model = MTEBModel(
        embedder,
        name=name,
        instructions=config.instructions,
        instruction_template=config.instruction_template,
        symmetric=config.symmetric,
        normalize=config.normalize,
        truncate_dim=config.truncate_dim,
        batch_size=config.batch_size,
    )
    if config.output is None:
        output = _free_of_others(output, model.revision)
    run = evaluate(model, tasks, output)
    print(_beside(run, config.published).markdown() if config.published else scores_table(run).markdown())
    missing = sorted(set(names) - {score.task for score in run.scores})
    print(f"\n{output}: scores.json, report.md, report.html")
    if missing:
        print(f"error: left out: {', '.join(missing)}; the report says why", file=sys.stderr)
    return 1 if missing else 0


def _free_of_others(folder: Path, revision: str) -> Path:
    """The folder, or one named after the revision too, where it holds the report of another.

    A model that was trained on, or is read in another way, keeps its earlier report, to be compared with.
    """
    from jaxembed.evaluation.scores import Run

    try:
        found = Run.load(folder)
    except InputError:  # there is none, or a damaged one
        return folder
    if found.revision == revision:
        return folder
    other = folder.with_name(f"{folder.name}@{revision}")
    logger.info("%s holds the report of %s, so this one goes to %s", folder, found.revision, other)
    return other


def _compare(folders: Sequence[str], output: str | None) -> int:
    from jaxembed.evaluation.comparison import compare, write_comparison
    from jaxembed.evaluation.scores import Run

    runs = [Run.load(folder) for folder in folders]
    comparison = compare(runs) if output is None else write_comparison(runs, output)
    print(comparison.markdown(), end="")
    if output is not None:
        print(f"\n{output}: comparison.md, comparison.html")
    return 0


def _beside(run: "Run", published: Mapping[str, float]) -> "Table":
    """The scores found, and published ones in percent."""
    from jaxembed.evaluation.scores import by_task, task_value
    from jaxembed.evaluation.tables import Table, percent

    rows = []
    for tasks in by_task(run.scores).values():
        for task, scores in tasks.items():
            value, known = task_value(scores), published.get(task)
            beside = ["–", "–"] if known is None else [f"{known:.2f}", percent(value - known / 100, sign=True)]
            rows.append([task, scores[0].metric, percent(value), *beside])
    return Table(["", "metric", run.model, "published", "difference"], rows)


def _config(arguments: argparse.Namespace) -> EvaluateConfig:
    """The file's, under what the options say."""
    options = vars(arguments).items()
    given = {key: value for key, value in options if key in EvaluateConfig.model_fields and value is not None}
    config = EvaluateConfig() if arguments.config is None else read_config(EvaluateConfig, arguments.config)
    try:
        return EvaluateConfig.model_validate({**config.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None


def _parser() -> argparse.ArgumentParser:
    keys = "\n".join(f"  {name}: {field.description}" for name, field in EvaluateConfig.model_fields.items())
    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.evaluate",
        description="Score a model on tasks of mteb's (their data come from the Hugging Face hub) and on local files, "
        "by mteb, and write a report. A run that was stopped goes on when it is started again.",
        epilog=f"keys of a config file:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with the keys below; options stand over it")
    what = parser.add_argument_group("tasks")
    what.add_argument(
        "--task",
        action="append",
        dest="tasks",
        metavar="[KIND:]PATH[,option=value…]",
        help="a folder or file, see docs/tasks.md; may be given several times",
    )
    what.add_argument("--benchmark", metavar="NAME", help='of mteb\'s, such as "MTEB(eng, v1)"')
    what.add_argument("--mteb-tasks", nargs="+", metavar="NAME", help="tasks of mteb's, such as STSBenchmark SciFact")
    model = parser.add_argument_group("model and devices")
    model.add_argument("--model", metavar="MODEL", help="directory of a model, or hub id")
    model.add_argument("--revision", help="branch, tag or commit of a hub id (default: the main branch)")
    model.add_argument("--name", help="of the model in tables (default: its hub id, or directory)")
    model.add_argument(
        "--text-format", metavar="FILE", dest="format_file", help="YAML or JSON, instead of the model's own"
    )
    model.add_argument("--dtype", help="of the computation: auto, float32 or bfloat16 (default: auto)")
    model.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="embeddings to unit length (default: as the text format has it)",
    )
    model.add_argument("--truncate-dim", type=int, metavar="DIM", help="keep this many dimensions (default: all)")
    model.add_argument("--batch-size", type=int, metavar="ROWS", help="of the longest length at once")
    model.add_argument("--fsdp", type=int, metavar="DEVICES", help="over which the weights are split (default: 1)")
    out = parser.add_argument_group("report")
    out.add_argument(
        "--output",
        metavar="DIR",
        help="of the report (default: evaluations/NAME; with @REVISION behind it where that has "
        "the report of another revision)",
    )
    out.add_argument(
        "--compare",
        nargs="+",
        metavar="DIR",
        help="reports to put side by side, with paired bootstrap intervals, instead of an evaluation",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
