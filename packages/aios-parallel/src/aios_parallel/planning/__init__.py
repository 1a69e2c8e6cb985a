"""How to spread a model over devices, before renting them: shards, bytes, times, and a recommendation.

`devices` and `collectives` say what the hardware can do, `weights` and `shards` what the model weighs and how it is
cut, `costs` how long a step takes, `plans` which ways there are, `advice` which one to take and why.
"""
