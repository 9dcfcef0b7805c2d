package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"blockferry/blockdev/udev"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
)

type checkOptions struct {
	configOnly bool
}

func newCheck(g *globalOptions) *cobra.Command {
	var o checkOptions
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look at configuration, kernel and disks; change nothing",
		Long:  "Reads the configuration, asks the kernel for what is needed, and looks at every\ndisk. Each finding that is not good ends with what to do. Needs no agent, and ends\nwith another code than 0 if something would refuse.",
		Args:  atMost(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.check(doctor.Live(), o)
		},
	}
	cmd.Flags().BoolVar(&o.configOnly, "config-only", false, "only the configuration; touches no kernel and no disk")
	return cmd
}

func (g *globalOptions) check(system *doctor.System, o checkOptions) error {
	c, err := config.Load(g.config)
	if err != nil {
		return err
	}
	findings := doctor.Findings{{Level: doctor.Good, Subject: g.config, Message: fmt.Sprintf("%d volume(s)", len(c.Volumes))}}
	if !o.configOnly {
		kernel := system.Kernel(c.Volumes...)
		findings = append(findings, kernel...)
		findings = append(findings, system.DeadMan(defaultDeadManSocket)...)
		findings = append(findings, doctor.Node(c, now())...)
		findings = append(findings, doctor.Lease(c)...)
		c.Resolve(udev.Path)
		disks := system.Volumes(c)
		for _, v := range c.Volumes {
			findings = append(findings, disks[v]...)
			findings = append(findings, system.Spills(v)...)
			if !v.Secondary() {
				findings = append(findings, system.Discards(v))
			}
		}
		findings = append(findings, system.Distinct(c.DiskUses())...)
		findings = append(findings, system.DistinctSpills(c)...)
	}
	refusals := 0
	for _, f := range findings {
		if f.Level == doctor.Refuse {
			refusals++
		}
		if g.json {
			err = g.sayJSON(f)
		} else {
			_, err = fmt.Fprintln(g.out, f)
		}
		if err != nil {
			return err
		}
	}
	if refused := findings.Err(); refused != nil {
		return exit.Errorf(exit.Of(refused), "%d of %d findings would keep blockferry from working", refusals, len(findings))
	}
	return nil
}
