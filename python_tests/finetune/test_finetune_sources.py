"""Where rows come from: files of several formats, folders, the hub, and what cannot be read."""

import gzip
import http.server
import json
import os
import subprocess
import sys
import threading

import datasets
import pandas
import pytest
from helpers.restricted_imports import ROOT, TARGET, only_allowed_imports

from lift_kernels.errors import UserError
from lift_kernels.finetune.forms import COLUMNS
from lift_kernels.finetune.sources import _read_hub, read_rows

ROWS = [{"question": f'How\nmany "{i}", \u2028 é 中?', "answer": f"0{i}"} for i in range(3)]
TEXTS = [{"text": "a"}, {"text": "b"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(path, split="train"):
    return read_rows([str(path)], split, COLUMNS)


def values(path, split="train"):
    return [row.values for row in read(path, split)]


def refusal(path, split="train") -> str:
    with pytest.raises(UserError) as error:
        read(path, split)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(f"{path}", "PATH")


def to_lines(path):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))


WRITERS = {
    "lines.jsonl": to_lines,
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": to_lines,
    "CAPITALS.JSONL": to_lines,
    "datasets.jsonl": lambda path: datasets.Dataset.from_list(ROWS).to_json(path),
    "datasets.csv": lambda path: datasets.Dataset.from_list(ROWS).to_csv(path),
    "datasets.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "pandas.json": lambda path: pandas.DataFrame(ROWS).to_json(path, orient="records"),
    "pandas.csv": lambda path: pandas.DataFrame(ROWS).to_csv(path, index=False),
    "excel.csv": lambda path: pandas.DataFrame(ROWS).to_csv(
        path, index=False, encoding="utf-8-sig", lineterminator="\r\n"
    ),
    "pandas.csv.gz": lambda path: pandas.DataFrame(ROWS).to_csv(path, index=False),
    "pandas.parquet": lambda path: pandas.DataFrame(ROWS).to_parquet(path),
    "odd [1] *?.parquet": lambda path: pandas.DataFrame(ROWS).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_gives_its_texts_as_they_were_written(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert values(tmp_path / name) == ROWS
    assert os.listdir(tmp_path) == [name], "nothing is written beside the data"


def test_compressed_lines_and_very_long_ones_are_read(tmp_path):
    long = [{"text": "é" * 1_000_000}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(long[0]).encode()))
    (tmp_path / "a.csv").write_text("text\n" + long[0]["text"] + "\n")
    assert values(tmp_path / "a.jsonl.gz") == values(tmp_path / "a.csv") == long


def test_csv_rows_have_the_line_they_begin_in_and_unnamed_columns_do_no_harm(tmp_path):
    frame = pandas.DataFrame({"text": ["a\nb", "NA", "null"], "more": [1, 2, 3]})
    frame.to_csv(tmp_path / "a.csv")
    rows = read(tmp_path / "a.csv")
    assert [row.values["text"] for row in rows] == ["a\nb", "NA", "null"]
    assert [row.where for row in rows] == [f"{tmp_path / 'a.csv'}, line {n}" for n in (2, 4, 5)]


def test_parquet_gives_numbers_of_any_width_and_leaves_other_columns_out(tmp_path):
    frame = pandas.DataFrame({"question": ["a", "b"], "answer": [7.1, 8.0], "embedding": [[1.0], [2.0]]})
    frame.astype({"answer": "float32"}).to_parquet(tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert rows[0].values == {"question": "a", "answer": 7.1}
    assert rows[1].where == f"{tmp_path / 'a.parquet'}, row 2"


REFUSED = {
    "a.csv": [
        ("question,answer\na,1\nb,1,2\nc\nd,3,4\n", "PATH, line 3: 3 fields, where the first line has 2; put a field"),
        ('question,answer\na,"1"2\n', "PATH, line 2: not valid CSV (',' expected after '\"'); put a field with quotes"),
        ('question,answer\na,1\nb,"1\nc,2\n', "PATH, line 3: not valid CSV (unexpected end of data)"),
        ("question,answer\n", "PATH holds no rows; check --data"),
    ],
    "a.jsonl": [("", "PATH holds no rows; check --data"), ("\n\n", "PATH holds no rows; check --data")],
    "a.json": [
        ("[]", "PATH holds no rows; check --data"),
        ('[\n{"text": 1},\n{"text" 1}]', "PATH, line 3: not valid JSON (Expecting ':' delimiter); correct the array"),
        ('{\n"text": "a"}', "PATH, line 1: not valid JSON (Expecting property name"),
    ],
    "a.parquet": [("PAR0", "cannot read PATH as Parquet: ")],
    "a.jsonl.gz": [("{}", "cannot read PATH: damaged gzip file (Not a gzipped file")],
    "a.txt": [("a", "cannot tell the format of PATH; give it a name that ends in .jsonl, .json, .csv, .parquet")],
}


@pytest.mark.parametrize(("name", "case"), [(name, i) for name in REFUSED for i in range(len(REFUSED[name]))])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, case):
    text, message = REFUSED[name][case]
    (tmp_path / name).write_text(text)
    assert refusal(tmp_path / name).startswith(message)


def test_a_cut_off_gzip_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a long enough text"}')[:25])
    assert refusal(tmp_path / "a.jsonl.gz").endswith("; compress it again")


def test_a_folder_has_the_splits_that_its_files_are_named_by(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "b"}\n{"text"}\n')
    (tmp_path / "README.txt").write_text("About the data.")
    assert values(tmp_path) == [{"text": "a"}]
    assert refusal(tmp_path, "test").startswith("PATH/test.jsonl, line 2: not valid JSON")
    assert refusal(tmp_path, "dev") == "PATH has no split 'dev'; give --split one of train, test"


def test_all_files_of_a_folder_without_splits_are_read(tmp_path):
    for i, name in enumerate(["b.csv", "a.csv", "sub/c.csv"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text\n{i}\n")
    assert sorted(row["text"] for row in values(tmp_path)) == ["0", "1", "2"]
    assert refusal(tmp_path, "test") == "PATH has no split 'test'; give --split one of train"
    (tmp_path / "d.jsonl").write_text('{"text": "d"}\n')
    left_out = "PATH has files of several formats, and d.jsonl would be left out; name the files in --data"
    assert refusal(tmp_path) == left_out


def test_folders_that_datasets_saved_are_read(tmp_path):
    one = datasets.Dataset.from_list(TEXTS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert values(tmp_path / "one") == values(tmp_path / "two") == TEXTS
    assert [row.where for row in read(tmp_path / "two", "test")] == [f"{tmp_path / 'two'}, row 1"]
    assert refusal(tmp_path / "two", "dev") == "PATH has no split 'dev'; give --split one of train, test"


def test_an_empty_folder_and_a_split_of_a_file_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith("cannot read the folder PATH: ")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert refusal(tmp_path / "a.jsonl", "test") == "split is 'test', and PATH has no splits; leave out --split"


def test_names_that_are_neither_files_nor_hub_ids_are_refused(tmp_path, monkeypatch):
    assert refusal("a b/c") == "cannot read PATH: there is no such file, and it is no hub id; check --data"
    assert refusal("no/such/folder").endswith("there is no such file, and it is no hub id; check --data")
    assert refusal("some.jsonl") == "cannot read PATH: No such file or directory; check --data"


def test_the_hub_without_network_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    expected = "there is no file nobody/none here, and the hub does not answer; check --data and the network"
    assert refusal("nobody/none").replace("PATH", "nobody/none") == expected
    assert refusal("nobody/none:main") == expected


PROGRAM = """
import sys
from lift_kernels.errors import UserError
from lift_kernels.finetune.sources import read_rows
for name in sys.argv[1:]:
    try: print(read_rows([name], "train", ()))
    except UserError as error: print(error)
"""


def said_of(names, environment) -> list[str]:
    """What a new process says of each name."""
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class NoSuchRepository(http.server.BaseHTTPRequestHandler):
    """What the hub answers for a dataset that does not exist."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_a_hub_id_that_does_not_exist_is_one_line(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoSuchRepository) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
        lines = said_of(["nobody/none"], here | {"HF_HOME": str(tmp_path)})
        server.shutdown()
    assert lines == [
        "there is no file nobody/none, and no dataset of that name on the hub that you may read; check --data"
    ]


def test_splits_and_configurations_of_a_dataset_are_named(tmp_path):
    """datasets says the same of a folder as of a dataset on the hub."""
    (tmp_path / "train.csv").write_text("text,other\na,1\n")
    (tmp_path / "test.csv").write_text("text,other\nb,2\n")
    rows = _read_hub(str(tmp_path), None, "test", COLUMNS)
    assert [(row.values, row.where) for row in rows] == [({"text": "b"}, f"{tmp_path}, row 1")]
    with pytest.raises(UserError, match="Unknown split .*'train', 'test'.*; give another --split$"):
        _read_hub(str(tmp_path), None, "dev", COLUMNS)
    parts = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("train", "test"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    with pytest.raises(UserError, match=r"\['train', 'test'\]; append one to --data, such as .*:CONFIGURATION$"):
        _read_hub(str(tmp_path), None, "train", COLUMNS)
    assert len(_read_hub(str(tmp_path), "test", "train", COLUMNS)) == 1


def test_files_of_json_and_csv_need_no_datasets_and_the_rest_says_what_it_needs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "a.csv").write_text("text\na\n")
    pandas.DataFrame(TEXTS).to_parquet(tmp_path / "a.parquet")
    names = [str(tmp_path / name) for name in ("a.jsonl", "a.csv", "a.parquet", "")] + ["nobody/none"]
    lines = said_of(names, only_allowed_imports(tmp_path, TARGET))
    assert lines[0].startswith("[Row(values={'prompt': 'a', 'completion': 'b'}")
    assert lines[1].startswith("[Row(values={'text': 'a'}")
    assert lines[2] == f"reading {names[2]} needs the package pyarrow; run `pip install pyarrow`"
    assert lines[3] == f"reading the folder {tmp_path} needs the package datasets; run `pip install datasets`"
    assert lines[4] == "reading nobody/none from the hub needs the package datasets; run `pip install datasets`"
