//go:build !race

package e2e_test

// raceEnabled: these tests look for data races, so the keyward that they build does too.
const raceEnabled = false
