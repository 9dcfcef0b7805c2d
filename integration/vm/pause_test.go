package vm

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

// All processes of a guest stop, those that its first one has made too, and go on.
func TestStopAll(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root makes a PID namespace")
	}
	t.Parallel()
	cmd := exec.Command("/bin/sh", "-c", "sleep 1000 & echo; exec sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	ended, done := make(chan error, 1), make(chan struct{})
	go func() {
		ended <- runOnThread(cmd, false, nil, func() { close(done) })
	}()
	<-done
	defer func() { _ = cmd.Process.Kill(); <-ended }()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	others, err := companions(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if len(others) < 1 {
		t.Fatal("it has made no other process: this test checks nothing")
	}
	all := append(others, cmd.Process.Pid)
	running := func() (running []int) {
		for _, pid := range all {
			states, err := threadStates(pid)
			if err != nil || len(states) == 0 {
				t.Errorf("process %d: %v", pid, err)
			}
			for _, s := range states {
				if s != 'T' {
					running = append(running, pid)
				}
			}
		}
		return running
	}
	stopped, err := stopAll(cmd.Process.Pid)
	if got := running(); err != nil || len(stopped) != len(all) || len(got) > 0 {
		t.Errorf("stopped %v of %v, %v run, %v", stopped, all, got, err)
	}
	if err := continueAll(stopped); err != nil {
		t.Error(err)
	}
	for deadline := time.Now().Add(20 * time.Second); len(running()) < len(all); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("only %v of %v run again", running(), all)
		}
	}
	if _, err := stopAll(os.Getpid() + 1<<23); err == nil {
		t.Error("no such process, and it was stopped")
	}
}
