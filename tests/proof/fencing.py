"""Agents that come back too late: what they say is refused, what they run is ended, and what they might take goes to another.

Real controller (with a short --lost-after), real agents, real scripts; a few of the parts speak the protocol themselves, where
the words of an answer matter. Short: ten scenes; full: also scripts that ignore TERM, frozen scripts, and a controller that is
frozen for longer than an agent waits for an answer.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from chaos import Agent, Repository
from common import Client, LightAgent, Proof, check, run, wait_for

LOST_AFTER = 2.0  # seconds
AWAY = 7.0  # seconds that a controller is stopped: longer than LOST_AFTER, and than the pause that it takes for a slow machine
ENDED = ("success", "failed", "cancelled")
# Ticks until the gate opens. As branches: `plain` ends on TERM, `slow` takes its time, `stubborn` does not end.
SCRIPT = """\
#!/bin/sh
folder=$1
case $DEPLOY_REF in
    stubborn) trap '' TERM;;
    slow) trap 'left=40; while [ $left -gt 0 ]; do sleep 0.05; left=$((left - 1)); done; exit 1' TERM;;
esac
exec 9> "$folder/lock.$DEPLOY_HOST"
flock -n 9 || echo "overlap" >> "$folder/$DEPLOY_JOB_ID.starts"
echo "$DEPLOY_RELEASE" >> "$folder/$DEPLOY_JOB_ID.starts"
while ! [ -e "$folder/$DEPLOY_JOB_ID.gate" ]; do
    echo tick
    echo tick >> "$folder/$DEPLOY_JOB_ID.ticks"
    sleep 0.05
done
echo "went through the gate"
"""


def carries(process: pathlib.Path, mark: bytes) -> bool:
    """Whether it lives and was started with that variable."""
    try:
        return mark in (process / "environ").read_bytes().split(b"\0") and (
            (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        )
    except OSError:
        return False


def processes_of(job_id: str) -> list[int]:
    mark = f"DEPLOY_JOB_ID={job_id}".encode()
    return [int(entry.name) for entry in pathlib.Path("/proc").glob("[0-9]*") if carries(entry, mark)]


class Scene:
    """One controller for many scenes at once; each has hosts of its own."""

    def __init__(self, proof: Proof, name: str):
        self.proof, self.base = proof, proof.folder / name
        self.folder = self.base / "gates"
        self.folder.mkdir(parents=True)
        self.repository = Repository(self.base / "source", 1, random.Random(proof.seed))
        script = self.repository.folder / "tick.sh"
        script.write_text(SCRIPT)
        script.chmod(0o755)
        self.repository.git("add", "--all")
        self.repository.git("commit", "--quiet", "--message", "ticks")
        for branch in ("plain", "slow", "stubborn"):
            self.repository.git("branch", branch)
        app = {
            "name": "app", "repo": "myorg/app", "clone_url": f"file://{self.repository.folder}", "hosts": ["web-01"],
            "deploy": ["./tick.sh", str(self.folder)],
        }  # fmt: skip
        times = ("--lost-after", LOST_AFTER, "--agent-timeout", LOST_AFTER)
        self.controller = proof.controller(*times, name=f"{name}/controller", apps={"apps": [app]})
        self._clients = threading.local()

    @property
    def client(self) -> Client:
        """One a thread."""
        if not hasattr(self._clients, "one"):
            self._clients.one = Client(self.controller.port, timeout=120)
        return self._clients.one

    def agent(self, host: str, folder: str = "hosts", slots: int = 1) -> Agent:
        """One that has registered."""
        agent = Agent(self.base / folder, host, self.controller.port, self.repository.env, "--slots", str(slots))
        agent.launch()
        agent.says("registered as")
        return agent

    def create(self, host: str, ref: str = "plain", **more: Any) -> str:
        return self.client.ok("POST", "/v1/jobs", {"repo": "myorg/app", "ref": ref, "host": host, "force": True, **more})["job"][
            "id"
        ]

    def job(self, job_id: str) -> dict[str, Any]:
        return self.client.ok("GET", f"/v1/jobs/{job_id}")["job"]

    def ended(self, job_id: str, seconds: float = 60) -> dict[str, Any]:
        wait_for(lambda: self.job(job_id)["status"] in ENDED, seconds, f"the end of {self.job(job_id)}")
        return self.job(job_id)

    def ticks(self, job_id: str) -> int:
        try:
            return (self.folder / f"{job_id}.ticks").stat().st_size
        except FileNotFoundError:
            return 0

    def running(self, job_id: str) -> str:
        """Waits until its script runs and some of its output is stored."""
        wait_for(lambda: self.ticks(job_id) and self.client.lines(job_id), 30, f"the script of {self.job(job_id)}")
        return job_id

    def open_gate(self, job_id: str) -> None:
        (self.folder / f"{job_id}.gate").touch()

    def starts(self, job_id: str) -> list[str]:
        """The release of each start of its script, in order."""
        try:
            lines = (self.folder / f"{job_id}.starts").read_text().splitlines()
        except FileNotFoundError:
            return []
        check("overlap" not in lines, "two scripts of one app at once:", lines)
        return lines

    def gone(self, job_id: str, seconds: float) -> float:
        """Waits until nothing of it runs any more; how long that took."""
        began = time.monotonic()
        wait_for(lambda: not processes_of(job_id), seconds, f"the end of the processes of {job_id}")
        return time.monotonic() - began

    def lost(self, agent: Agent, job_id: str) -> dict[str, Any]:
        """Stops the agent until the controller gives the job up; the job."""
        agent.signal(signal.SIGSTOP)
        ticks = self.ticks(job_id)
        job = self.ended(job_id, LOST_AFTER + 30)
        check((job["status"], job["reason"]) == ("failed", "agent_lost"), "ended as", job["status"], job["reason"])
        check(self.ticks(job_id) > ticks, "the script was to go on meanwhile")
        return job

    def unchanged(self, job: dict[str, Any], lines: int) -> None:
        check(self.job(job["id"]) == job, "an ended job changed:", job, self.job(job["id"]))
        check(len(self.client.lines(job["id"])) == lines, "an ended job got lines")

    def works(self, agent: Agent) -> None:
        """The agent is as good as before: it takes the next job."""
        job_id = self.create(agent.host)
        self.open_gate(job_id)
        job = self.ended(job_id)
        check(job["status"] == "success", "the next job of", agent.host, job["status"], job["error"], agent.said()[-1500:])


# ---------------------------------------------------------------------------------------------------------------------
# An agent that was stopped past --lost-after


def stopped_agent(scene: Scene) -> None:
    """Its lines and its result are refused with 409, its script is ended, and it goes on to the next job."""
    agent = scene.agent("stopped-01")
    job = scene.lost(agent, scene.running(scene.create(agent.host)))
    lines = len(scene.client.lines(job["id"]))
    agent.signal(signal.SIGCONT)
    took = scene.gone(job["id"], 30)
    wait_for(lambda: f"job {job['id']}: 409" in agent.said(), 10, "a 409 in the agent's log")
    scene.unchanged(job, lines)
    scene.works(agent)
    scene.unchanged(job, lines)
    check(len(scene.starts(job["id"])) == 1, "it was started", scene.starts(job["id"]))
    scene.proof.figure("script ended after SIGCONT", f"{took:.2f} s")
    agent.stop()


def stopped_agent_with_a_result(scene: Scene) -> None:
    """Its script ended well meanwhile; the controller has told people that it failed, and so it stays."""
    agent = scene.agent("stopped-02")
    job = scene.lost(agent, scene.running(scene.create(agent.host)))
    lines = len(scene.client.lines(job["id"]))
    scene.open_gate(job["id"])
    scene.gone(job["id"], 30)
    agent.signal(signal.SIGCONT)
    wait_for(lambda: f"job {job['id']}: 409" in agent.said(), 30, "a 409 in the agent's log")
    scene.works(agent)
    scene.unchanged(job, lines)
    status, answer = scene.client.call("POST", f"/v1/jobs/{job['id']}/result", {"attempt": 1, "status": "success"})
    check(status == 409, "the result of a lost attempt answered", status, answer)
    agent.stop()


def stopped_agent_with_retries(scene: Scene) -> None:
    """The next attempt comes at once, as there is a slot, and waits until the script of the first is ended: never two at once."""
    agent = scene.agent("stopped-03", slots=2)
    job_id = scene.running(scene.create(agent.host, "slow", retries=1))
    agent.signal(signal.SIGSTOP)
    wait_for(lambda: scene.job(job_id)["status"] == "pending", LOST_AFTER + 30, "the attempt to be given up")
    agent.signal(signal.SIGCONT)
    wait_for(lambda: len(scene.starts(job_id)) == 2, 30, "the second start")
    check(scene.job(job_id)["attempt"] == 2, scene.job(job_id))
    scene.open_gate(job_id)
    job = scene.ended(job_id)
    check((job["status"], job["attempt"], len(scene.starts(job_id))) == ("success", 2, 2), job, scene.starts(job_id))
    agent.stop()


def stubborn_script(scene: Scene) -> None:
    """A script that ignores TERM gets KILL."""
    agent = scene.agent("stopped-04")
    job = scene.lost(agent, scene.running(scene.create(agent.host, "stubborn")))
    agent.signal(signal.SIGCONT)
    took = scene.gone(job["id"], 40)
    check(took > 5, "it was killed before it could have ended well:", took)
    scene.works(agent)
    scene.proof.figure("script that ignores TERM ended after SIGCONT", f"{took:.2f} s")
    agent.stop()


def frozen_script(scene: Scene) -> None:
    """The agent comes back and its script does not: KILL ends that too."""
    agent = scene.agent("stopped-05")
    job_id = scene.running(scene.create(agent.host))
    agent.signal(signal.SIGSTOP)
    for pid in processes_of(job_id):
        os.kill(pid, signal.SIGSTOP)
    job = scene.ended(job_id, LOST_AFTER + 30)
    check(job["reason"] == "agent_lost" and processes_of(job_id), job)
    agent.signal(signal.SIGCONT)
    scene.gone(job_id, 40)
    scene.works(agent)
    agent.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Two agents with one host name


def another_secret(scene: Scene) -> None:
    """Whoever has the enrolment token alone does not take over a host that has enrolled."""
    agent = scene.agent("twins-01")
    job_id = scene.running(scene.create(agent.host))
    other = Agent(scene.base / "impostor", agent.host, scene.controller.port, scene.repository.env)
    other.launch()
    other.says("409")
    more = [scene.create(agent.host) for _ in range(2)]
    for each in (job_id, *more):
        scene.open_gate(each)
        check(scene.ended(each)["status"] == "success", scene.job(each))
        (start,) = scene.starts(each)
        check(start.startswith(str(agent.workdir)), "the impostor got", each)
    check(agent.poll() is None and "registered as" not in other.said(), other.said())
    agent.stop()
    other.stop()


def same_secret(scene: Scene) -> None:
    """A host that was cloned with its secret: the newer one is it; the older is told, ends its script, takes nothing and ends."""
    older = scene.agent("twins-02")
    job_id = scene.running(scene.create(older.host))
    state = scene.base / "clone" / older.host / ".agent"
    state.mkdir(parents=True, mode=0o700)
    shutil.copy(older.workdir / ".agent" / "secret", state / "secret")
    more = [scene.create(older.host) for _ in range(3)]
    for each in more:
        scene.open_gate(each)
    newer = scene.agent(older.host, "clone")
    took = scene.gone(job_id, 30)
    check(older.wait(30) == 3, "the older one ended with", older.poll(), older.said()[-1500:])
    for each in more:
        check(scene.ended(each)["status"] == "success", scene.job(each))
        (start,) = scene.starts(each)
        check(start.startswith(str(newer.workdir)), "the older one got", each)
    job = scene.job(job_id)
    check((job["status"], job["reason"]) == ("failed", "agent_crashed"), "the job of the older one", job)
    scene.proof.figure("script of the older twin ended", f"{took:.2f} s")
    newer.stop()


def older_session(scene: Scene) -> None:
    """The words of it: the parked call of the older session is answered 409 at once, and all that come after."""
    older, newer = LightAgent(scene.controller.port, "twins-03"), LightAgent(scene.controller.port, "twins-03")
    older.register()
    held = scene.create("twins-03")
    status, answer = older.beat(wait=5)
    check(status == 200 and answer["job"]["id"] == held, status, answer)
    key, said = (held, 1), {}
    parked = threading.Thread(target=lambda: said.update(parked=older.beat([key], wait=25)), daemon=True)
    parked.start()
    began = time.monotonic()
    wait_for(lambda: newer.register()[0] == 200, 10)
    parked.join(30)
    check(not parked.is_alive() and said["parked"][0] in (200, 409), said)
    waiting = scene.create("twins-03")
    for _ in range(3):
        status, answer = older.beat([key])
        check(status == 409, "the older session's heartbeat answered", status, answer)
    status, answer = newer.beat([])
    check(status == 200 and (answer["job"] or {}).get("id") == waiting, "the newer one got", status, answer)
    check(scene.job(held)["reason"] == "agent_crashed", scene.job(held))
    for status, answer in (older.logs({"id": held, "attempt": 1}, 0, ["late"]), older.result({"id": held, "attempt": 1})):
        check(status == 409 and "next_offset" not in answer, "the older session's job answered", status, answer)
    status, answer = newer.result({"id": waiting, "attempt": 1})
    check(status == 200, status, answer)
    scene.proof.figure("parked older session told after", f"{time.monotonic() - began:.2f} s")


def one_folder(scene: Scene) -> None:
    """A second agent in the folder of the first ends by itself."""
    agent = scene.agent("twins-04")
    second = Agent(scene.base / "hosts", agent.host, scene.controller.port, scene.repository.env)
    second.launch()
    check(second.wait(30) == 4, "the second one ended with", second.poll())
    scene.works(agent)
    agent.stop()


# ---------------------------------------------------------------------------------------------------------------------
# A controller that was stopped; a host that was reset


def stopped_controller(scene: Scene, seconds: float = AWAY) -> None:
    """It was itself away: no agent is lost by that, each job ends as its script does, and none is run again."""
    agents = [scene.agent(f"patient-{number}") for number in range(3)]
    jobs = [scene.running(scene.create(agent.host)) for agent in agents]
    polling = LightAgent(scene.controller.port, "patient-poll", timeout=120)  # one that does not park
    polling.register()
    held = scene.create(polling.hostname)
    status, answer = polling.beat()
    check(status == 200 and answer["job"]["id"] == held, status, answer)
    scene.controller.signal(signal.SIGSTOP)
    scene.open_gate(jobs[0])  # this one ends while the controller is away
    time.sleep(seconds)  # the time that it is away is what this is about
    scene.controller.signal(signal.SIGCONT)
    time.sleep(1.2)  # it sweeps once a second; an agent that polls calls when its own pause is over
    for _ in range(10):
        status, answer = polling.beat([(held, 1)])
        check(status == 200 and not answer["cancel"], "after a stopped controller:", status, answer, scene.job(held))
    status, answer = polling.result({"id": held, "attempt": 1})
    check(status == 200, "a result after a stopped controller answered", status, answer)
    wait_for(lambda: all(host["agent_status"] == "online" for host in hosts_of(scene, agents)), 30, "the agents online")
    for job_id in jobs:
        scene.open_gate(job_id)
        job = scene.ended(job_id)
        check(
            (job["status"], job["attempt"]) == ("success", 1),
            "after a stopped controller:",
            job["status"],
            job["reason"],
            job["error"],
        )
        check(len(scene.starts(job_id)) == 1, scene.starts(job_id))
    for agent in agents:
        agent.stop()


def hosts_of(scene: Scene, agents: list[Agent]) -> list[dict[str, Any]]:
    names = {agent.host for agent in agents}
    return [host for host in scene.client.ok("GET", "/v1/hosts")["hosts"] if host["hostname"] in names]


def long_stopped_controller(scene: Scene) -> None:
    """For longer than an agent waits for the answer to a parked heartbeat."""
    stopped_controller(scene, 65)


def reset_host(scene: Scene) -> None:
    """An agent with the enrolment token registers anew, and its job goes on."""
    agent = scene.agent("reset-01")
    job_id = scene.running(scene.create(agent.host))
    scene.client.ok("POST", f"/v1/hosts/{agent.host}/reset")
    wait_for(lambda: agent.said().count("registered as") == 2 or agent.poll() is not None, 30, "a new registration")
    check(agent.poll() is None, "a reset ended the agent:", agent.poll(), agent.said()[-1500:])
    scene.open_gate(job_id)
    job = scene.ended(job_id)
    check((job["status"], job["attempt"], len(scene.starts(job_id))) == ("success", 1, 1), job, scene.starts(job_id))
    scene.works(agent)
    agent.stop()


def reset_words(scene: Scene) -> None:
    """After a reset the old secret is none: 401 or 404, never 409, which would end an agent; and a parked call takes nothing."""
    agent = LightAgent(scene.controller.port, "reset-02")
    agent.register()
    said: dict[str, tuple[int, Any]] = {}
    parked = threading.Thread(target=lambda: said.update(parked=agent.beat(wait=25)), daemon=True)
    parked.start()
    wait_for(
        lambda: (
            "online"
            in [host["agent_status"] for host in scene.client.ok("GET", "/v1/hosts")["hosts"] if host["hostname"] == "reset-02"]
        )
    )
    scene.client.ok("POST", "/v1/hosts/reset-02/reset")
    parked.join(30)
    waiting = scene.create("reset-02")
    check(said["parked"][0] in (401, 404), "the parked call answered", said["parked"])
    status, answer = agent.beat()
    check(status in (401, 404), "a heartbeat with the old secret answered", status, answer)
    agent.enrolment.token = agent.secret
    status, answer = agent.register()
    check(status == 401, "a registration with the old secret answered", status, answer)
    fresh = LightAgent(scene.controller.port, "reset-02")
    fresh.secret = fresh.client.token = "dbt_another_secret"
    status, answer = fresh.register()
    check(status == 200, "a new enrolment answered", status, answer)
    status, answer = fresh.beat([])
    check(status == 200 and (answer["job"] or {}).get("id") == waiting, "the new one got", status, answer)
    fresh.result(answer["job"])


SHORT: tuple[Callable[[Scene], None], ...] = (
    stopped_agent, stopped_agent_with_a_result, stopped_agent_with_retries, another_secret, same_secret, older_session,
    one_folder, stopped_controller, reset_host, reset_words,
)  # fmt: skip
FULL: tuple[Callable[[Scene], None], ...] = (*SHORT, stubborn_script, frozen_script, long_stopped_controller)
ALONE = (stopped_controller, long_stopped_controller)  # no other scene has their controller


def prove(proof: Proof) -> None:
    scenes = [scene for scene in (FULL if proof.full else SHORT) if proof.options.only in (None, scene.__name__)]
    proof.chance.shuffle(scenes)
    scenes.sort(key=lambda scene: scene not in ALONE)  # they take the longest

    def play(scene: Callable[[Scene], None], stage: Scene) -> None:
        began = time.monotonic()
        scene(stage)
        proof.say(f"{scene.__name__}: {time.monotonic() - began:.1f} s")

    shared = Scene(proof, "shared")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # most of the time they wait
        plays = [pool.submit(play, scene, Scene(proof, scene.__name__) if scene in ALONE else shared) for scene in scenes]
        failures = [future.exception() for future in plays]
    for failure in filter(None, failures):
        raise failure
    for log in proof.folder.glob("*/controller/controller.log"):
        check("Traceback" not in log.read_text(), "a traceback in", log)
    proof.figure("scenes", len(scenes))


if __name__ == "__main__":
    sys.exit(run(prove, __doc__, ("--only", {"help": "one scene by its name"})))
