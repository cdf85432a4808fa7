"""The resource: its models, the CustomResourceDefinitions made from them, and the rules, evaluated without a cluster.

Imports nothing of the operator. What a field means stands at the field in `models` and reaches `kubectl explain` from
there.
"""
