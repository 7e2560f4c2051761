"""``tolaria watch``: on this machine alone, and never a writer."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tolaria.cli.main import main
from tolaria.report.server import Server, Watched, loopback

pytest.importorskip("plotly")


@pytest.fixture
def served(make_run):
    run = make_run(
        metrics=[{"kind": "step", "step": s, "loss": 1 / s} for s in range(1, 20)], config={"task": "mine"}
    )
    (run / "secret.txt").write_text("secret")
    watched = Watched(run)
    watched.read_once()
    with Server(("127.0.0.1", 0), watched) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server, watched, run
        server.shutdown()
        thread.join()


def ask(server, path="/", host=None, method="GET"):
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_the_page_and_what_is_new(served):
    server, watched, run = served
    answer, body = ask(server)
    assert answer.status == 200
    assert b"connect-src &#x27;self&#x27;" in body
    data = json.loads(ask(server, "/data.json?after=-1")[1])
    assert data["runs"][0]["last"] == 19
    assert ask(server, f"/data.json?after={data['data_version']}")[0].status == 204
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 20, "loss": 5.0}\n')
    assert watched.read_once()
    newer = json.loads(ask(server, f"/data.json?after={data['data_version']}")[1])
    assert newer["runs"][0]["panels"][0]["series"][0]["y"][-1] == 5.0


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1:1",
        "127.0.0.1.evil.example:{port}",
        "192.168.1.1:{port}",
        "",
    ],
)
def test_a_foreign_host_is_refused(served, host):
    server = served[0]
    name = host.format(port=server.server_address[1]) or "localhost"  # without the port
    for path in ("/", "/data.json", "/files/metrics.jsonl"):
        answer, body = ask(server, path, name)
        assert answer.status == 403
        assert b"loss" not in body


def test_names_of_this_machine_are_welcome(served):
    port = served[0].server_address[1]
    for name in (f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert ask(served[0], "/data.json", name)[0].status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/files/secret.txt",
        "/files/../secret.txt",
        "/files/%2e%2e/secret.txt",
        "/files/",
        "/files//etc/passwd",
        "/secret.txt",
    ],
)
def test_only_the_record_is_served(served, path):
    answer, body = ask(served[0], path)
    assert answer.status == 404
    assert body != b"secret"


def test_raw_files_are_text(served):
    answer, body = ask(served[0], "/files/metrics.jsonl")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert body == (served[2] / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(served, method):
    assert ask(served[0], method=method)[0].status == 501


@pytest.mark.parametrize("after", ["x", "", "9" * 5000, "-5", "\u0663"])
def test_an_odd_question_gets_everything(served, after):
    from urllib.parse import quote

    assert ask(served[0], f"/data.json?after={quote(after)}")[0].status == 200


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.1", "10.0.0.1", "example.org", "", "127.0.0.1.evil.example"]
)
def test_no_address_but_loopback(make_run, capsys, host):
    assert (
        main(["watch", str(make_run(metrics=[{"kind": "step", "step": 1, "loss": 1}])), "--host", host]) == 2
    )
    assert "host: expected a loopback address" in capsys.readouterr().err


def test_loopback_addresses():
    assert [loopback(each) for each in ("localhost", "127.0.0.1", "127.9.9.9", "::1")] == [
        "127.0.0.1",
        "127.0.0.1",
        "127.9.9.9",
        "::1",
    ]


def test_a_folder_that_goes_away_leaves_what_is_known(served):
    server, watched, run = served
    for file in run.iterdir():
        file.unlink()
    run.rmdir()
    watched.read_once()
    assert json.loads(ask(server, "/data.json?after=-1")[1])["runs"][0]["last"] == 19


def test_the_command_serves_until_interrupted_and_writes_nothing(make_run):
    run = make_run(metrics=[{"kind": "step", "step": 1, "loss": 1.0}])
    before = {file.name: file.stat() for file in run.iterdir()}
    run.chmod(0o555)
    process = subprocess.Popen(
        [sys.executable, "-m", "tolaria", "watch", str(run)], stdout=subprocess.PIPE, text=True
    )
    try:
        said = process.stdout.readline()
        assert "http://127.0.0.1:" in said
        port = int(said.split("127.0.0.1:")[1].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/data.json")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()
        run.chmod(0o755)
    after = {file.name: file.stat() for file in run.iterdir()}
    assert {k: (v.st_size, v.st_mtime_ns, v.st_ino) for k, v in before.items()} == {
        k: (v.st_size, v.st_mtime_ns, v.st_ino) for k, v in after.items()
    }
    assert os.path.isdir(run)
