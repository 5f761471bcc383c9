"""A process that is killed at any moment, or many that meet: the folder holds the last state that was committed."""

import hashlib
import os
import random
import select
import signal
import time

import pytest
from small_engram import contents, load, make_engram, state, write

from karla_hf.modeling import stored_table_karla
from karla_hf.modeling.exchange_karla import export_pack, import_pack, merge_packs, verify_engram
from karla_hf.modeling.lock_karla import lock_folder
from karla_hf.modeling.packs_karla import save_engram


SHA = "f" * 64


def digest(engram) -> str:
    return hashlib.sha256(repr(state(engram)).encode()).hexdigest()


def change(engram, folder, dice: random.Random) -> None:
    """One of the things that are done to a memory, which is small, so that it is merged and compacted all the time."""
    what = dice.random()
    names = sorted(engram.packs)
    if what < 0.1 and len(names) > 1:
        merge_packs(engram, dice.sample(names, 2), f"m{dice.randrange(10**9)}")
    elif what < 0.15 and len(names) > 1:
        del engram.packs[dice.choice(names)]
    elif what < 0.2 and names:
        place = folder.parent / f"out-{os.getpid()}-{dice.randrange(10**9)}"
        export_pack(engram, names[0], place, SHA)
        import_pack(engram, place, f"i{dice.randrange(10**9)}", SHA)
    else:
        for _ in range(dice.randrange(1, 4)):
            write(engram, dice.choice("ab"), seed=dice.randrange(10**9))


def work(folder, pipe, seed) -> None:
    """Load, change and save for ever; tell the digest of every state before and after it is committed."""
    dice = random.Random(seed)
    engram = load(folder)
    for number in range(10**9):
        if number % 10 == 9:
            engram = load(folder)
        change(engram, folder, dice)
        name = digest(engram).encode()
        os.write(pipe, b"?" + name + b"\n")
        save_engram(engram, folder, SHA)
        os.write(pipe, b"!" + name + b"\n")


def in_child(function, *arguments) -> tuple[int, int]:
    """Run a function in a process of its own; returns its id and the end of a pipe that it writes to."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(ours)
            function(*arguments[:1], theirs, *arguments[1:])
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    return child, ours


def read_all(pipe) -> list[str]:
    with os.fdopen(pipe, "rb") as file:
        return file.read().decode().split("\n")[:-1]


def kill_writers(folder, number, monkeypatch) -> dict[str, int]:
    """Kill as many writers as told, each at a moment of its own, and look at the folder after each of them."""
    monkeypatch.setattr(stored_table_karla, "MOST_FILES", 3)
    monkeypatch.setattr(stored_table_karla, "DENSE_BYTES", 3000)
    dice = random.Random(7)
    engram = make_engram("ab")
    save_engram(engram, folder, SHA)
    committed, counts = digest(engram), {"commits": 0, "killed within a save": 0, "leftovers": 0}
    for seed in range(number):
        child, pipe = in_child(work, folder, seed)
        assert select.select([pipe], [], [], 60)[0]  # it has begun
        time.sleep(dice.random() * 0.3)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        lines = read_all(pipe)
        done = [line[1:] for line in lines if line[0] == "!"]
        pending = [line[1:] for line in lines if line[0] == "?"][len(done) :]
        assert len(pending) <= 1
        committed = done[-1] if done else committed
        loaded = load(folder)
        assert loaded.damaged == {}
        assert digest(loaded) in [committed, *pending], f"writer {seed} lost what was committed"
        committed = digest(loaded)
        counts["commits"] += len(done)
        counts["killed within a save"] += bool(pending)
        counts["leftovers"] += any(path.name.startswith(".") for path in (folder / "engram").iterdir())
        if seed % 20 == 19:
            assert verify_engram(folder) == {}
            save_engram(loaded, folder, SHA)
            assert not any(path.name.startswith(".") for path in (folder / "engram").iterdir())
            assert digest(load(folder)) == committed
    return counts


def test_killed_writers_lose_nothing(tmp_path, monkeypatch):
    counts = kill_writers(tmp_path / "karla", 10, monkeypatch)
    assert counts["commits"] > 3


@pytest.mark.slow
def test_three_hundred_killed_writers_lose_nothing(tmp_path, monkeypatch):
    counts = kill_writers(tmp_path / "karla", 300, monkeypatch)
    print(counts)  # noqa: T201
    assert counts["commits"] > 200
    assert counts["killed within a save"] > 100
    assert counts["leftovers"] > 30


def read_on(folder, pipe, seconds) -> None:
    end, found = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        engram = load(folder)
        assert engram.damaged == {}
        os.write(pipe, digest(engram).encode() + b"\n")
        found += 1
    assert found > 1


def test_readers_see_whole_states_while_a_writer_commits(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_table_karla, "MOST_FILES", 2)
    folder = tmp_path / "karla"
    engram = make_engram("ab")
    save_engram(engram, folder, SHA)
    states = {digest(engram)}
    readers = [in_child(read_on, folder, 2.0) for _ in range(2)]
    end, dice = time.monotonic() + 2.0, random.Random(1)
    while time.monotonic() < end:
        change(engram, folder, dice)
        states.add(digest(engram))
        save_engram(engram, folder, SHA)
    for child, pipe in readers:
        seen = read_all(pipe)
        assert os.waitpid(child, 0)[1] == 0
        assert set(seen) <= states
    assert len(states) > 5


def write_in_turn(folder, pipe, pack, times) -> None:
    done = 0
    while done < times:
        try:
            with lock_folder(folder / "engram"):
                engram = load(folder)
                write(engram, pack, seed=done)
                save_engram(engram, folder, SHA)
            done += 1
        except OSError as error:
            assert "Another process is writing" in str(error)  # noqa: PT017
            time.sleep(0.001)


def test_writers_who_hold_the_lock_from_load_to_save_lose_nothing_of_each_other(tmp_path):
    folder = tmp_path / "karla"
    save_engram(make_engram(), folder, SHA)
    writers = [in_child(write_in_turn, folder, pack, 10) for pack in "ab"]
    for child, pipe in writers:
        read_all(pipe)
        assert os.waitpid(child, 0)[1] == 0
    expected = make_engram()
    for pack in "ab":
        for seed in range(10):
            write(expected, pack, seed=seed)
    found = state(load(folder))
    assert found == state(expected)
    assert not any(name.startswith("engram/.") for name in contents(folder))
