"""An export read by several releases of sentence-transformers, and by vLLM: token ids and embeddings beside our own.

Two exports of a small random BLOOM: the default text format (text prefixes, one end token), which every release has to
read, and udever's markers, which need a chat template that only releases from 5.7 on complete after truncation; older
ones have to refuse. Each release is installed in a virtual environment of its own below `--environments` and reads the
exports in a process there. Exit status 1 where a release does not do what it has to; vLLM is only recorded.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import machine, table

TORCH = "torch==2.13.0"
RELEASES = ("5.1.2/4.57.6", "5.4.1/4.57.6", "5.7.0/4.57.6", "5.7.0/5.24.0", "6.2.0/5.24.0")
"""Of sentence-transformers and of transformers; 6.2 asks for transformers 5."""
MARKERS_FROM = (5, 7)
"""The first release that has to read the markers; an older one may refuse them."""
UNSTRIPPED_FROM = (5, 4)
"""The first release that does not strip texts."""
TOLERANCE = 1e-4
ROLES = ("query", "document")

# Run in the reader's environment, where jaxembed is not. Read texts and prompts, write one JSON object.
BEFORE = """
import importlib.metadata, json, platform, sys, warnings
warnings.simplefilter("ignore")
directory, request_file, result_file = sys.argv[1:]
request = json.load(open(request_file, encoding="utf-8"))
texts, result = request["texts"], {"python": platform.python_version()}
def read():
"""
AFTER = """
if __name__ == "__main__":  # vLLM starts processes of its own
    try:
        read()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        result["error"] = f"{type(error).__name__}: {lines[0]}"
    result["transformers"] = importlib.metadata.version("transformers")
    json.dump(result, open(result_file, "w", encoding="utf-8"))
"""
SENTENCE_TRANSFORMERS = """
    import torch
    from sentence_transformers import SentenceTransformer, __version__

    result["reader"], result["version"] = "sentence-transformers", __version__
    torch.set_num_threads(1)
    model = SentenceTransformer(directory, device="cpu")
    seen, inner = [], model[0].forward

    def record(features, **arguments):
        masks = features["attention_mask"].bool()
        seen.extend(ids[mask].tolist() for ids, mask in zip(features["input_ids"], masks))
        return inner(features, **arguments)

    model[0].forward = record  # the ids as the decoder gets them, whatever the release calls its tokenising method
    for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
        embeddings = encode(texts, batch_size=4, show_progress_bar=False)
        alone = []
        for text in texts:  # encode sorts texts by length; one at a time tells which ids are whose
            seen.clear()
            encode([text], show_progress_bar=False)
            alone.append(seen[0])
        result[role] = {"ids": alone, "embeddings": embeddings.tolist()}
"""
VLLM = """
    from vllm import LLM, __version__

    result["reader"], result["version"] = "vLLM", __version__
    model = LLM(model=directory, runner="pooling", dtype="float32", enforce_eager=True)
    tokenizer = model.get_tokenizer()
    for role, prompt in request["prompts"].items():
        if tokenizer.chat_template:  # as the server does it with `messages`
            chats = [[{"role": "system", "content": prompt}, {"role": "user", "content": text}] for text in texts]
            whole = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        else:
            whole = [prompt + text for text in texts]
        arguments = {"truncate_prompt_tokens": -1, "add_special_tokens": not tokenizer.chat_template}
        outputs = model.embed(whole, tokenization_kwargs=arguments, use_tqdm=False)
        ids = [output.prompt_token_ids for output in outputs]
        result[role] = {"ids": ids, "embeddings": [output.outputs.embedding for output in outputs]}
"""


@dataclass(frozen=True)
class Export:
    name: str
    directory: Path
    prompts: dict[str, str]
    texts: list[str]
    ids: dict[str, list[list[int]]]
    embeddings: dict[str, np.ndarray]


def make_exports(directory: Path, layers: int, dim: int, heads: int, max_length: int) -> list[Export]:
    """Both exports with our own ids and embeddings, which are kept beside them as `NAME.npz`."""
    import dataclasses

    from jaxembed.checkpoint.export import edge_texts
    from jaxembed.checkpoint.pretrained import random_decoder
    from jaxembed.embedder import Embedder
    from jaxembed.models import FAMILIES
    from jaxembed.text.format import DEFAULT_TEXT_FORMAT, UDEVER, UDEVER_MARKERS
    from jaxembed.text.tokenizer import TextTokenizer, train_byte_level_bpe, with_markers

    bpe = train_byte_level_bpe([path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))], 600)
    tokenizers = {
        "prefixes": TextTokenizer(bpe, dataclasses.replace(DEFAULT_TEXT_FORMAT, max_length=max_length)),
        "markers": TextTokenizer(with_markers(bpe, UDEVER_MARKERS), dataclasses.replace(UDEVER, max_length=max_length)),
    }
    family = FAMILIES["bloom"]
    config = family.config(vocab_size=608, dim=dim, layers=layers, heads=heads, initializer_range=0.2)
    exports = []
    directory.mkdir(parents=True, exist_ok=True)
    for name, tokenizer in tokenizers.items():
        embedder = Embedder(random_decoder(family, config, seed=0), tokenizer, dtype="float32")
        embedder.save_pretrained(directory / name, overwrite=True, verify=False)
        texts = edge_texts(tokenizer.text_format)
        ids = {role: [each.tolist() for each in tokenizer(texts, role)] for role in ROLES}
        embeddings = {"query": embedder.encode_query(texts), "document": embedder.encode_document(texts)}
        query, document = embeddings["query"], embeddings["document"]
        np.savez(directory / f"{name}.npz", ids=np.array(json.dumps(ids)), query=query, document=document)
        prompts = {role: tokenizer.text_format.role(role).prompt for role in ROLES}
        exports.append(Export(name, directory / name, prompts, texts, ids, embeddings))
    return exports


def environment(directory: Path, sentence_transformers: str, transformers: str) -> Path:
    """The Python of a virtual environment with these releases; made where it is not there yet."""
    path = directory / f"sentence-transformers-{sentence_transformers}-transformers-{transformers}"
    python = path / "bin" / "python"
    wanted = [TORCH, f"sentence-transformers=={sentence_transformers}", f"transformers=={transformers}"]
    complete = path / ".complete"
    if complete.exists():
        return python
    print(f"installing {' '.join(wanted)} in {path}", file=sys.stderr)
    shutil.rmtree(path, ignore_errors=True)
    if uv := shutil.which("uv"):
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, path], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", python, *wanted], check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    complete.touch()
    return python


def read(python: Path, script: str, export: Export, directory: Path) -> dict:
    """What the reader in that environment makes of the export."""
    child, request, result = directory / "child.py", directory / "request.json", directory / "result.json"
    child.write_text(BEFORE + script + AFTER)
    request.write_text(json.dumps({"texts": export.texts, "prompts": export.prompts}))
    result.unlink(missing_ok=True)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [python, child, export.directory, request, result]
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, cwd="/")
    if not result.exists():
        sys.exit(f"error: {python} failed:\n{done.stderr}")
    return json.loads(result.read_text())


def compare(export: Export, role: str, theirs: dict, chosen: list[int]) -> tuple[str, str, list[int]]:
    """How many ids are equal, the largest difference, and which of the chosen texts differ in either."""
    found = np.asarray(theirs["embeddings"], np.float32)
    differences = np.abs(found - export.embeddings[role]).max(axis=-1)
    equal = [number for number in chosen if theirs["ids"][number] == export.ids[role][number]]
    differing = [number for number in chosen if number not in equal or not differences[number] <= TOLERANCE]
    return f"{len(equal)} of {len(chosen)}", f"{differences[chosen].max():.1e}", differing


def rows_of(export: Export, found: dict) -> list[tuple[dict[str, object], bool]]:
    """The table's rows for an export in a reader, each with whether it is as it has to be."""
    recorded = found["reader"] == "vLLM"
    version = tuple(int(part) for part in found["version"].split(".")[:2])
    about = {"reader": f"{found['reader']} {found['version']}", "transformers": found["transformers"]}
    about |= {"python": found["python"], "export": export.name}
    if "error" in found:
        refusal = {"role": "both", "ids equal": "-", "difference": "-", "outer white space": "-"}
        may_refuse = export.name == "markers" and version < MARKERS_FROM
        return [({**about, **refusal, "verdict": f"refuses: {found['error']}"}, recorded or may_refuse)]
    rows = []
    for role in ROLES:
        sequences = [export.prompts[role] + text for text in export.texts]
        spaced = [number for number, sequence in enumerate(sequences) if sequence != sequence.strip()]
        plain = [number for number in range(len(sequences)) if number not in spaced]
        ids, difference, differing = compare(export, role, found[role], plain)
        spaced_ids, spaced_difference, spaced_differing = compare(export, role, found[role], spaced)
        everything = sorted(differing + spaced_differing)
        names = ", ".join(shown(export.texts[number]) for number in everything)
        row = {
            "role": role,
            "ids equal": ids,
            "difference": difference,
            "outer white space": f"{spaced_ids}, {spaced_difference}",
            "verdict": f"differs on {names}" if names else "exact",
        }
        wrong = differing + (spaced_differing if version >= UNSTRIPPED_FROM else [])
        rows.append(({**about, **row}, recorded or not wrong))
    return rows


def shown(text: str) -> str:
    """A text in a cell of a Markdown table."""
    return f"`{(text if len(text) <= 24 else text[:23] + '…')!r}`".replace("|", "\\|")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--environments", type=Path, required=True, help="directory of virtual environments, reused")
    options.add_argument(
        "--releases", nargs="+", default=RELEASES, help="sentence-transformers/transformers, one environment each"
    )
    options.add_argument("--vllm", type=Path, help="the Python of an environment that has vLLM, to be read there too")
    options.add_argument("--layers", type=int, default=3)
    options.add_argument("--dim", type=int, default=128)
    options.add_argument("--heads", type=int, default=4)
    options.add_argument("--max-length", type=int, default=64, help="tokens; one edge text is longer")
    options.add_argument("--keep", type=Path, help="directory for exports and our embeddings, default a temporary one")
    arguments = options.parse_args()
    rows: list[tuple[dict[str, object], bool]] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = (arguments.keep or Path(temporary)).absolute()
        exports = make_exports(directory, arguments.layers, arguments.dim, arguments.heads, arguments.max_length)
        for release in arguments.releases:
            python = environment(arguments.environments.absolute(), *release.split("/"))
            for export in exports:
                rows += rows_of(export, read(python, SENTENCE_TRANSFORMERS, export, Path(temporary)))
        for export in exports if arguments.vllm else []:
            rows += rows_of(export, read(arguments.vllm.absolute(), VLLM, export, Path(temporary)))
    failed = sum(not right for _, right in rows)
    print(f"{machine()}\n`{' '.join(['python benchmarks/versions.py', *sys.argv[1:]])}`\n")
    print(
        f"BLOOM, {arguments.layers} layers of {arguments.dim}, {arguments.heads} heads, random, float32, CPU; "
        f"{arguments.max_length} tokens at most. ids: texts whose token ids equal ours; difference: of an embedding's "
        f"component, at most {TOLERANCE:.0e} counts as exact. Outer white space: texts that have it together with the "
        "prompt, so that releases that strip change them (the empty text after `query: ` is one).\n"
    )
    print(table([row for row, _ in rows]))
    print(f"\n{failed} rows are not as they have to be." if failed else "\nAll rows are as they have to be.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
