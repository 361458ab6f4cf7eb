"""Headrace as a rollout backend of verl: `rollout.name=headrace`, without a change in verl.

`entry` is what verl loads; it names the classes of `adapter` and `replica`, which load verl and Ray when they are asked
for. `translation` is what verl's words mean, and needs neither.
"""
