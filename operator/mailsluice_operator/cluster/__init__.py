"""The Kubernetes API, alone: what is asked of it, what is known of it, what is written to it.

Objects are plain dicts as the API has them; everything above decides, nothing here does.
"""
