// Command demo shows what blockferry is for, on a real kernel in a guest: a
// file system on a replicated volume is written to by several writers, the
// SSD below is wiped in mid-load, the volume is restored from its replica, and
// every block is held against what the writers knew to be durable.
//
// It ends in one line that begins with 'demo: OK' or 'demo: FAILED', and exits
// with 0 only if nothing differs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"time"

	"blockferry/integration/rig"
	"blockferry/integration/uml"
)

const (
	ssdBytes   = 1280 << 20
	ebsBytes   = 1280 << 20
	guestLimit = 170 * time.Second
	binaryVar  = "BLOCKFERRY_BINARY"
	secondsVar = "BLOCKFERRY_DEMO_SECONDS"
)

func main() {
	uml.Init()
	seconds := flag.Int("seconds", 20, "how long to write before the SSD is wiped")
	flag.Parse()
	var err error
	if uml.Inside() {
		err = show(context.Background())
	} else {
		err = boot(*seconds)
	}
	if err != nil {
		fmt.Println("demo: FAILED:", err)
		os.Exit(1)
	}
}

// boot runs the demo in a guest and shows the guest's console.
func boot(seconds int) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	host, err := uml.NewHost(1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	binary, err := rig.Build(host.Dir())
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	fmt.Println("Booting a guest: a Linux kernel with device-mapper, as an ordinary process.")
	result, err := host.Run(ctx, uml.Spec{
		Name: "demo", Memory: "1200M", Timeout: guestLimit, KernelSilent: true, Console: os.Stdout,
		Disks:   []uml.Disk{{Size: ssdBytes}, {Size: ebsBytes}},
		Modules: []string{"dm-mod", "dm-era", "dm-snapshot"},
		Args:    []string{self},
		Env:     []string{binaryVar + "=" + uml.GuestPath(binary), fmt.Sprintf("%s=%d", secondsVar, seconds)},
	})
	if err != nil {
		return err
	}
	if result.Exit != 0 {
		os.Exit(result.Exit) // the guest has said why
	}
	return nil
}
