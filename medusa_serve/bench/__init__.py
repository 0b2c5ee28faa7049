"""What a user measures on a machine: `medusa-serve bench …`. A bench returns plain data that JSON holds: the rule, the
machine, the command, the options and the figures. The developers' own benches are in tests/campaigns/."""
