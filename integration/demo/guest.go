package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"time"

	"blockferry/integration/rig"
	"blockferry/integration/uml"
)

const (
	guestLimit = 170 * time.Second
	binaryVar  = "BLOCKFERRY_BINARY"
	secondsVar = "BLOCKFERRY_DEMO_SECONDS"

	guestSSD = "/dev/ubda" // below the mapped device 'ssd', so that it can fail
	guestEBS = "/dev/ubdb"
)

// boot has the demo shown in a guest, and shows the guest's console.
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
		Disks:   []uml.Disk{{Size: diskBytes}, {Size: diskBytes}},
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

// inGuest is the demo within it.
func inGuest() error {
	seconds, err := strconv.Atoi(os.Getenv(secondsVar))
	if err != nil {
		return err
	}
	return show(context.Background(), guest{}, rig.Rig{Binary: os.Getenv(binaryVar), Config: "/run/blockferry/demo.yaml"}, seconds)
}

// guest is a stage with device-mapper: the volume is on a mapper of its own,
// and the SSD below another one, to fail.
type guest struct{}

func (guest) configuration() string {
	return `volumes:
  data:
    device: /dev/mapper/ssd
    size: 640MiB
    interval: 1s
    replicas:
      ebs:
        device: ` + guestEBS + `
        compression: s2
`
}

func (guest) device() string { return "/dev/mapper/data" }
func (guest) folder() string { return "/mnt/data" }

func ssdTable(target string) string { return fmt.Sprintf("0 %d %s", diskBytes/512, target) }

func (g guest) raise(ctx context.Context, d *demo) error {
	if err := rig.Do("dmsetup", "create", "ssd", "--table", ssdTable("linear "+guestSSD+" 0")); err != nil {
		return err
	}
	if err := d.rig.Run(ctx, "create", "data"); err != nil {
		return err
	}
	if err := d.rig.StartAgent(ctx, &d.log); err != nil {
		return err
	}
	if err := rig.AwaitFile(g.device(), 20*time.Second); err != nil {
		return err
	}
	if err := makeFileSystem(g.device()); err != nil {
		return err
	}
	return d.mount()
}

// lose has the error table stand before the disk is zeroed.
func (guest) lose(_ *demo, lost func()) error {
	if err := rig.SwapTable("ssd", ssdTable("error")); err != nil {
		return err
	}
	lost()
	return rig.Zero(guestSSD, diskBytes)
}

func (guest) replace(*demo) error {
	for _, name := range []string{"data", "data-snap", "data-era", "data-base", "data-cow", "data-meta", "data-data"} { // from the top down
		if rig.Do("dmsetup", "info", name) != nil {
			continue // which inner ones there are depends on when the disk was lost
		}
		if err := rig.Do("dmsetup", "remove", "--force", name); err != nil {
			return err
		}
	}
	return rig.SwapTable("ssd", ssdTable("linear "+guestSSD+" 0"))
}
