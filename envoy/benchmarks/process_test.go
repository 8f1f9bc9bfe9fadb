package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests' goroutines must not get the first thread, which never ends.
func init() { runtime.LockOSThread() }

// TestProcessTimeKeepsWhatEndedThreadsUsed: runtimes end threads whenever they like.
func TestProcessTimeKeepsWhatEndedThreadsUsed(t *testing.T) {
	read := func() time.Duration {
		used, err := processTime(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		return used
	}
	before := read()
	during := make(chan time.Duration)
	var thread string
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		thread = fmt.Sprintf("/proc/self/task/%d", unix.Gettid())
		for used := time.Duration(0); used < before+50*time.Millisecond; {
			var err error
			if used, err = processTime(os.Getpid()); err != nil {
				t.Error(err)
				break
			}
		}
		during <- read()
	}()
	used := <-during
	for tries := 0; ; tries++ {
		if _, err := os.Stat(thread); errors.Is(err, fs.ErrNotExist) {
			break
		}
		if tries == 10_000 {
			t.Fatal("the thread does not end")
		}
		time.Sleep(time.Millisecond)
	}
	if after := read(); after < used {
		t.Errorf("%v with the thread, %v after it, %v before: what it used is gone", used, after, before)
	}
}

// TestProcessTimeOfAnother: what is measured is never the process itself.
func TestProcessTimeOfAnother(t *testing.T) {
	if used, err := processTime(1); err != nil || used <= 0 {
		t.Errorf("process 1: %v, %v", used, err)
	}
	if used, err := processTime(1<<22 + 1); err == nil {
		t.Errorf("a process that is not there: %v", used)
	}
}
