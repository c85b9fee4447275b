"""What the tests share: models, tables of cases, servers, and processes."""
