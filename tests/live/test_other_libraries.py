"""Deltas on models that other libraries load, wrap, divide or offload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from live.live_helpers import copied, same, tuned
from live.model_helpers import change, make, saved

import sparsedelta
from sift_train import export_delta
from sparsedelta.errors import StructureMismatch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def check(base: Path, target: Path, live: Any, wanted: Mapping[str, torch.Tensor]) -> None:
    """Check a delta between two folders on a model that was loaded from the base."""
    before = copied(live.state_dict())
    with sparsedelta.diff(base, target) as delta:
        delta.apply_(live, verify="full")
        assert same(live.state_dict(), wanted)
        assert not same(before, wanted)
        delta.revert_(live, verify="full")
        assert same(live.state_dict(), before)


class TestSentenceTransformers:
    """Each module is saved in a folder of its own."""

    @pytest.fixture
    def library(self) -> Any:
        return pytest.importorskip("sentence_transformers")

    def saved(self, path: Path, *modules: Any) -> list[Path]:
        """Save a model of these modules before and after a change."""
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(modules=list(modules), device="cpu")
        folders = [path / "base", path / "target"]
        for folder in folders:
            model.save(str(folder))
            model.load_state_dict(tuned(model.state_dict()))
        return folders

    def check(self, folders: list[Path]) -> None:
        from sentence_transformers import SentenceTransformer

        live, wanted = (SentenceTransformer(str(folder), device="cpu") for folder in folders)
        check(folders[0], folders[1], live, wanted.state_dict())

    def static(self, seed: int = 0) -> Any:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        generator = torch.Generator().manual_seed(seed)
        words = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        weights: Any = torch.randn(2, 8, generator=generator).numpy()
        return StaticEmbedding(words, embedding_weights=weights)

    def bert(self, path: Path) -> Any:
        from sentence_transformers.sentence_transformer.modules import Transformer

        saved(make("bert").bert.float(), path)
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (path / "vocab.txt").write_text("\n".join(tokens))
        tokenizer: Any = transformers.BertTokenizer
        tokenizer(str(path / "vocab.txt")).save_pretrained(path)
        return Transformer(str(path))

    def test_a_transformer_with_other_modules(self, tmp_path: Path, library: Any) -> None:
        from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Pooling

        modules = Pooling(16), Dense(16, 12), LayerNorm(12)
        folders = self.saved(tmp_path, self.bert(tmp_path / "bert"), *modules)
        assert (folders[0] / "2_Dense/model.safetensors").exists()
        self.check(folders)

    def test_static_embeddings(self, tmp_path: Path, library: Any) -> None:
        self.check(self.saved(tmp_path, self.static()))

    def test_a_router(self, tmp_path: Path, library: Any) -> None:
        """The modules of its routes have the same names and shapes."""
        from sentence_transformers.sentence_transformer.modules import Router

        router = Router.for_query_document([self.static()], [self.static(1)])
        folders = self.saved(tmp_path, router)
        assert len(list(folders[0].glob("*_0_StaticEmbedding/model.safetensors"))) == 2
        self.check(folders)

    def test_a_folder_that_the_model_has_not(self, tmp_path: Path, library: Any) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Dense, Pooling

        modules = self.bert(tmp_path / "bert"), Pooling(16)
        base, target = self.saved(tmp_path, *modules, Dense(16, 12))
        live = SentenceTransformer(modules=list(modules), device="cpu")
        before = copied(live.state_dict())
        with (
            sparsedelta.diff(base, target) as delta,
            pytest.raises(StructureMismatch, match=r"'linear.bias', .* is not in the"),
        ):
            delta.apply_(live)
        assert same(live.state_dict(), before)

    def test_export(self, tmp_path: Path, library: Any) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Dense, Pooling

        modules = self.bert(tmp_path / "bert"), Pooling(16), Dense(16, 12)
        base, _ = self.saved(tmp_path, *modules)
        model = SentenceTransformer(str(base), device="cpu")
        first = copied(model.state_dict())
        model.load_state_dict(tuned(first, "2.linear.weight"))
        assert export_delta(model, tmp_path / "d.sd", base=base) == 16 * 12 // 5
        live = SentenceTransformer(str(base), device="cpu")
        with sparsedelta.load(tmp_path / "d.sd") as delta:
            delta.apply_(live, verify="full")
        assert same(live.state_dict(), model.state_dict())


class Mixtral:
    """A model of which transformers merges the experts, before and after a change."""

    def __init__(self, path: Path) -> None:
        model = make("mixtral")
        self.folders = path / "base", path / "target"
        for folder in self.folders:
            saved(model, folder)
            change(model)
        self.target = self.load(self.folders[1]).state_dict()

    def load(self, folder: Path | None = None, **options: Any) -> Any:
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_pretrained(folder or self.folders[0], **options)


@pytest.fixture
def mixtral(tmp_path: Path) -> Mixtral:
    return Mixtral(tmp_path)


def test_a_device_map(mixtral: Mixtral) -> None:
    check(*mixtral.folders, mixtral.load(device_map="cpu"), mixtral.target)


def test_compiled_layers(mixtral: Mixtral) -> None:
    live = mixtral.load()
    for number, layer in enumerate(live.model.layers):
        live.model.layers[number] = torch.compile(layer)
    parts = [name.split("._orig_mod") for name in live.state_dict()]
    wanted = {"._orig_mod".join(name): mixtral.target["".join(name)] for name in parts}
    check(*mixtral.folders, live, wanted)


def test_a_module_of_which_peft_trains_a_copy(mixtral: Mixtral) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    live = peft.get_peft_model(mixtral.load(), config)
    wanted = copied(live.state_dict())
    for name in wanted:
        own = name.removeprefix("base_model.model.").replace("base_layer.", "")
        own = own.replace("original_module.", "")
        wanted[name] = mixtral.target.get(own, wanted[name])
    check(*mixtral.folders, live, wanted)


@pytest.mark.parametrize("to_disk", [False, True])
def test_offloaded_weights(mixtral: Mixtral, tmp_path: Path, to_disk: bool) -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    live = mixtral.load()
    device = torch.device("cpu")
    if to_disk:
        accelerate.disk_offload(live, str(tmp_path / "offloaded"), execution_device=device)
    else:
        accelerate.cpu_offload(live, execution_device=device)
    with (
        sparsedelta.diff(*mixtral.folders) as delta,
        pytest.raises(StructureMismatch, match=r"meta device.*without offloading.*load_model"),
    ):
        delta.apply_(live)


def test_timm_from_a_folder_of_the_hub(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    folders = tmp_path / "base", tmp_path / "target"
    model = timm.create_model("test_vit", pretrained=False, num_classes=5)
    config = {"architecture": "test_vit", "num_classes": 5}
    for folder in folders:
        timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
        model.load_state_dict(tuned(model.state_dict()))
    live, wanted = (
        timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
        for folder in folders
    )
    check(*folders, live, wanted.state_dict())


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


def test_open_clip_from_a_folder_of_the_hub(tmp_path: Path) -> None:
    """Such folders also have the model's weights as transformers names them."""
    import json

    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    folders = tmp_path / "base", tmp_path / "target"
    model = open_clip.model.CLIP(**CLIP)
    for folder in folders:
        folder.mkdir()
        config = {"model_cfg": CLIP, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        state = copied(model.state_dict())
        save_file(state, folder / "open_clip_model.safetensors")
        save_file({f"other_{n}": t for n, t in state.items()}, folder / "model.safetensors")
        model.load_state_dict(tuned(model.state_dict()))
    live, wanted = (open_clip.create_model(f"local-dir:{folder}") for folder in folders)
    with (
        sparsedelta.diff(*folders) as delta,
        pytest.raises(StructureMismatch, match=r"'other_.* is not in the model.*\(names\)"),
    ):
        delta.apply_(live)
    for folder in folders:
        (folder / "model.safetensors").unlink()
    check(*folders, live, wanted.state_dict())
