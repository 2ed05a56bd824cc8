"""The `local-sandbox` driver: each VM a uid, namespaces, control groups and a relayed network of its own."""
