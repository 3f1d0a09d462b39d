"""`dgpo export`: a trained model as a folder that other programs take, with a model card."""

import shutil
from pathlib import Path
from typing import Any, Literal

from dgpo_core.agent.llama_cpp_engine import GGUF_FILE
from dgpo_core.config.params import PARAMS, Params, load_params
from dgpo_core.config.yaml_text import as_text
from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import read_scores, results
from dgpo_core.export.gguf_file import Precision, write_gguf
from dgpo_core.export.model_card import ExportedModel, model_card, modelfile
from dgpo_core.files import replacement
from dgpo_core.models import ADAPTER, load_model, load_tokenizer, save_model
from tasks.commands.agent import REGISTRY, model_name, resolve_model
from tasks.commands.show import markdown
from tasks.project.dvc import dvc_md5, read_lock
from tasks.project.git import head
from tasks.project.paths import EVALUATION
from tasks.tracking.registry import store

Form = Literal["gguf", "hf", "adapter"]
TOKENIZER = "tokenizer, for programs that give token ids"
COMMON = {PARAMS.name: "all settings of the training"}
FILES: dict[Form, dict[str, str]] = {
    "gguf": {
        GGUF_FILE: "weights and tokenizer, for llama.cpp, Ollama, LM Studio",
        "Modelfile": "for Ollama",
        "tokenizer.json": TOKENIZER,
    },
    "hf": {"model.safetensors": "weights, for transformers, vLLM", "tokenizer.json": TOKENIZER},
    "adapter": {"adapter_model.safetensors": "LoRA matrices, for PEFT", "adapter_config.json": "their shape"},
}


def export(reference: str, form: Form, out: Path, precision: Precision) -> None:
    """Write the model `reference` to the folder `out`, in place of an earlier export.

    Raises UserError for a model that does not have this form, and for a folder with other content.
    """
    if out.exists() and any(out.iterdir()) and not (out / PARAMS.name).is_file():
        raise UserError(f"--out {out}: this folder has something else in it")
    params = load_params()
    source = resolve_model(params, reference)
    exported = _exported(params, reference, source)
    tokenizer = load_tokenizer(source)
    with replacement(out) as part:
        match form:
            case "hf":
                save_model(load_model(source), tokenizer, part)
            case "gguf":
                _write_gguf_folder(exported, source, tokenizer, part, precision)
            case "adapter":
                _copy_adapter(source, part)
        card = model_card(
            exported, form, FILES[form] | COMMON, tokenizer, precision if form == "gguf" else ""
        )
        (part / "README.md").write_text(card, encoding="utf-8")
        (part / PARAMS.name).write_text(as_text(exported.params.model_dump(mode="json")), encoding="utf-8")
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _write_gguf_folder(
    exported: ExportedModel, source: str, tokenizer: Any, folder: Path, precision: Precision
) -> None:
    folder.mkdir()
    model = load_model(source)
    write_gguf(model, tokenizer, folder / GGUF_FILE, precision, exported.name)
    (folder / "Modelfile").write_text(modelfile(exported.params, tokenizer), encoding="utf-8")
    for part in (tokenizer, model.config, model.generation_config):
        part.save_pretrained(folder)


def _copy_adapter(source: str, folder: Path) -> None:
    adapter = Path(source) / ADAPTER
    if not adapter.is_dir():
        raise UserError(
            f"{source} has no adapter: it was not trained with compute.lora, or by a version that kept none; "
            "export it with --to hf"
        )
    shutil.copytree(adapter, folder)


def _exported(params: Params, reference: str, source: str) -> ExportedModel:
    """Find what a card says: of a registered model from the registry, else from this working tree."""
    name = model_name(reference, source)
    if reference.startswith(REGISTRY):
        with store() as registry:
            version = registry.named(reference)
            made = registry.lineage_of(version)
            own = Params.model_validate(made["params"])
            table = ""
            if version.tags.get("evaluation"):
                with registry.evaluation(version) as folder:
                    table = _table(folder, own)
            return ExportedModel(version.name, made["recipe"], own, made["code"]["commit"], table)
    recipe = reference if reference in params.recipes.all else ""
    table = _table(EVALUATION / name, params) if _is_evaluated(name, source) else ""
    return ExportedModel(name, recipe, params, head(Path()) if recipe else "", table)


def _is_evaluated(name: str, source: str) -> bool:
    """Tell whether evaluation/<name> is there, and of these bytes, going by dvc.lock."""
    stage = read_lock().get(f"evaluate@{name}")
    if stage is None or not Path(source).is_dir():
        return False
    folder = (EVALUATION / name).as_posix()
    asked = dvc_md5(Path(source)) in stage.deps.values()
    return asked and dvc_md5(Path(folder)) == stage.outs.get(folder)


def _table(folder: Path, params: Params) -> str:
    datasets = list(params.questions.test)
    scores = read_scores(folder.parent, [folder.name], datasets)
    return markdown({"95 % interval": results(scores, datasets)[folder.name]})
