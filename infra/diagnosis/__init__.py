"""What `dim doctor` looks at: store, tracker, machine, nodes. Each gives findings."""
