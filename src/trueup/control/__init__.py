"""Agents for Gymnasium environments: REINFORCE, A2C, PPO and DQN on the objectives of ``trueup.objectives``.

Several runs, one for each seed, learn side by side: every array has a leading axis S for them, and nothing flows from
one to another. N environments belong to each run, T steps to a rollout, B to a minibatch. Networks are small, so all
of it runs on the CPU.
"""
