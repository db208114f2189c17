"""The notebooks as committed; that they run is shown by `pytest --nbmake notebooks`."""

import ast
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(notebook: Path) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells(notebook))


def test_the_recipe_in_the_quickstart_notebook_is_the_config_file() -> None:
    """Where the repository is not at hand, as on Colab, the notebook brings its own copy."""
    sources = ("".join(cell["source"]) for cell in code_cells(REPOSITORY / "notebooks" / "quickstart.ipynb"))
    recipe = next(source for source in sources if source.startswith('RECIPE = """'))
    statement = ast.parse(recipe).body[0]
    assert isinstance(statement, ast.Assign)
    assert ast.literal_eval(statement.value) == (REPOSITORY / "configs" / "quickstart.yaml").read_text()
