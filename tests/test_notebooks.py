"""The notebooks as committed; that the small ones run is shown by `pytest --nbmake notebooks`."""

import ast
import json
from pathlib import Path

import pytest

from runs import Workshop, rows_of

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(notebook: Path) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells(notebook))


@pytest.mark.parametrize(
    ("notebook", "config"), [("quickstart", "quickstart"), ("finetune_on_tpu", "udever-bloom-560m")]
)
def test_the_recipe_in_a_notebook_is_the_config_file(notebook: str, config: str) -> None:
    """Where the repository is not at hand, as on Colab, the notebook brings its own copy."""
    sources = ("".join(cell["source"]) for cell in code_cells(REPOSITORY / "notebooks" / f"{notebook}.ipynb"))
    recipe = next(source for source in sources if source.startswith('RECIPE = """'))
    statement = ast.parse(recipe).body[0]
    assert isinstance(statement, ast.Assign)
    assert ast.literal_eval(statement.value) == (REPOSITORY / "configs" / f"{config}.yaml").read_text()


@pytest.mark.slow
def test_finetuning_with_small_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook for TPUs from its first cell to its last, on this machine: other parameters after its own."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    workshop = Workshop(tmp_path)
    recipe = workshop.write_config("small", training={"batch_size": 8, "steps": 400})
    notebook = nbformat.read(REPOSITORY / "notebooks" / "finetune_on_tpu.ipynb", as_version=4)
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    small = {
        "RECIPE": recipe.read_text(),
        "OVERRIDES": [],
        "STOP_AFTER": 20,
        "LENGTHS": "6,20",
        "EXAMPLES": 48,
        "FOLDER": str(tmp_path / "out"),
    }
    injected = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(injected))
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()

    run = tmp_path / "out" / "run"
    assert (run / "model" / "modules.json").exists()
    steps = [row["step"] for row in rows_of(run) if "train/loss" in row]
    assert steps == list(range(1, 401))
    log = (tmp_path / "out" / "train.log").read_text()
    assert "stopped by SIGTERM after step" in log
