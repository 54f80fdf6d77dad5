"""The shipped pair in a gymnasium loop.

python examples/act_in_a_loop.py [TASK] [STEPS]
"""

import sys

import openhelix


def main(task: str = "open_drawer", steps: int = 60) -> None:
    policy, system2 = openhelix.load_pair("shipped")
    env = openhelix.make_env("playtable", scene="D", actions="absolute", max_steps=steps)
    agent = openhelix.Agent(policy, system2, replan_steps=4, interval_steps=30)

    obs, info = env.reset(seed=0, options={"task": task})
    print("told to:", info["instruction"])
    agent.reset(info["instruction"])
    terminated = truncated = False
    while not (terminated or truncated):
        obs, reward, terminated, truncated, info = env.step(agent.act(obs))
    print(info["steps"], "steps; completed:", sorted(info["completed"]))
    env.close()


if __name__ == "__main__":
    words = sys.argv[1:]
    main(*words[:1], *map(int, words[1:2]))
