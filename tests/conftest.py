"""What every test may use: the fixtures of the test cluster (tests/cluster/testcluster/plugin.py)."""

pytest_plugins = ["testcluster.plugin"]
