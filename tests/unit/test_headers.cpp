// No test: a source for the headers that tests share precompiled.
