//go:build race

package local

// raceEnabled: the race detector allocates where the program does not.
const raceEnabled = true
