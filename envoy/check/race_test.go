//go:build race

package check_test

const raceEnabled = true // the race detector empties pools and allocates
