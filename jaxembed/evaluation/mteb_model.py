"""`MTEBModel`: an embedder as mteb takes it, so that any of its tasks and benchmarks runs on JAX's devices."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from jaxembed.embedder import Embedder
from jaxembed.errors import InputError

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput
    from torch.utils.data import DataLoader

LOCAL = "local file"
"""Where the data of a task of `mteb_tasks` come from, in place of a data set on the hub."""


class MTEBModel(AbsEncoder):
    """An `Embedder` behind mteb's encoder protocol: `mteb.evaluate(MTEBModel("my-embedder"), tasks)`.

    Queries and documents of retrieval and reranking are read in their roles, the texts of all other tasks as queries.
    Similarity is the cosine.

    Attributes:
        embedder: what embeds.
        progress: is called now and then with how many more texts are done, and how many tokens were computed.
    """

    def __init__(
        self,
        model: Embedder | str | os.PathLike[str],
        *,
        name: str | None = None,
        instructions: Mapping[str, str] | None = None,
        instruction_template: str | None = None,
        symmetric: Collection[str] = (),
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """
        Args:
            model: an embedder, or what `Embedder.from_pretrained` takes.
            name: for result files and tables; None: the hub id or the directory's name.
            instructions: text between a role's prefix and the user's text, in place of the text format's own
                instruction. The keys are mteb's, the first of which that is there counts: "SciFact-query", "SciFact",
                "Retrieval-query", "Retrieval", "query", and the same with "document".
            instruction_template: with "{instruction}", which the prompt that mteb has for a task takes the place of;
                stands before queries, and before the texts of tasks without roles. None: mteb's prompts are not used.
            symmetric: names or types of tasks whose documents are read as queries too.
            normalize: to unit length; None: as the text format has it. Cosines are the same either way, classifiers and
                clusters are not.
            truncate_dim: keeps the first dimensions only.
            batch_size: rows of the longest length at once, instead of what suits the device. mteb's own batch size has
                no say: texts are packed.

        Raises:
            InputError: the model cannot be loaded, or a template without "{instruction}".
        """
        if instruction_template is not None and "{instruction}" not in instruction_template:
            raise InputError(f'instruction_template: expected "{{instruction}}" in it, found {instruction_template!r}')
        self.embedder = model if isinstance(model, Embedder) else Embedder.from_pretrained(model)
        self.instructions = dict(instructions or {})
        self.instruction_template = instruction_template
        self.symmetric = frozenset(symmetric)
        self.progress: Callable[[int, int], object] | None = None
        self._options: dict[str, Any] = {
            "normalize_embeddings": normalize,
            "truncate_dim": truncate_dim,
            "batch_size": batch_size,
        }
        self._name = name or model_name(model)

    @property
    def revision(self) -> str:
        """The beginnings of the hash of the weights and of a hash of how texts are read (tokenizer, text format,
        instructions, dtype, …), so that no cache of results takes one model for another; of the present weights, where
        the embedder was given others.
        """
        reading = {
            "tokenizer and text format": self.embedder.tokenizer.fingerprint,
            "dtype": str(np.dtype(self.embedder.dtype)),
            "instructions": self.instructions,
            "template": self.instruction_template,
            "symmetric": sorted(self.symmetric),
            "normalize": self._options["normalize_embeddings"],
            "width": self._options["truncate_dim"],
        }
        read = hashlib.sha256(json.dumps(reading, sort_keys=True).encode()).hexdigest()
        return f"{self.embedder.model_hash[:16]}-{read[:8]}"

    @property
    def mteb_model_meta(self) -> ModelMeta:  # pyright: ignore[reportIncompatibleVariableOverride] (of mteb's protocol)
        """Name, revision and what else mteb wants to know."""
        return ModelMeta.create_empty(
            overwrites={
                "name": self._name,
                "revision": self.revision,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["JAX"],
                "embed_dim": self._options["truncate_dim"] or self.embedder.dim,
                "max_tokens": self.embedder.text_format.max_length,
                "use_instructions": bool(self.instructions or self.instruction_template),
            }
        )

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Float[np.ndarray, "texts dim"]:
        """Embeds the texts of mteb's batches, in their order.

        Of mteb's options only `show_progress_bar` is heeded.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        return self.embed(texts, task_metadata, prompt_type, show_progress_bar=kwargs.get("show_progress_bar"))

    def embed(
        self,
        texts: Sequence[str],
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool | None = False,
    ) -> Float[np.ndarray, "texts dim"]:
        """Embeds texts as those of a task, in a part of it; None: the task has no queries and documents.

        Raises:
            InputError: an embedding is not finite.
        """
        document = prompt_type == PromptType.document and self.symmetric.isdisjoint(
            (task_metadata.name, task_metadata.type)
        )
        role = "document" if document else "query"
        instruction = self._instruction(task_metadata, prompt_type, document)
        prompt = None if instruction is None else self.embedder.text_format.role(role).prefix + instruction
        found = self.embedder.encode(
            texts, role, prompt, show_progress_bar=show_progress_bar, progress=self.progress, **self._options
        )
        broken = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(broken):
            raise InputError(
                f"{task_metadata.name}: the embedding of the text {texts[broken[0]]!r:.60} is not finite: the model is "
                "damaged, or its dtype too narrow"
            )
        return found

    def _instruction(self, task_metadata: TaskMetadata, prompt_type: PromptType | None, document: bool) -> str | None:
        """What takes the place of the text format's own instruction, if anything does."""
        key = get_prompt_name(self.instructions, task_metadata, prompt_type)
        if key is not None:
            return self.instructions[key]
        if document:
            return None
        if task_metadata.dataset["path"] == LOCAL:
            prompt = task_metadata.prompt
            return prompt if isinstance(prompt, str) else None
        if self.instruction_template is None:
            return None
        return self.get_task_instruction(task_metadata, PromptType.query) or None


def model_name(model: Embedder | str | os.PathLike[str]) -> str:
    """A hub id, or the last two parts of a path: mteb's names have two."""
    if isinstance(model, Embedder):
        return "jaxembed/embedder"
    text = os.fspath(model)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists():
        return text
    path = Path(os.path.expanduser(text)).absolute()
    return f"{path.parent.name or 'local'}/{path.name}"
