package main

import (
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/spf13/cobra"

	"blockferry/cmd/blockferry/certs"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
)

// defaultAuthority is where an authority is kept. No node needs it.
const defaultAuthority = "/etc/blockferry/ca"

func newCerts(g *globalOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "certs",
		Short: "Make and show the certificates by which nodes know each other",
		Long:  "A small authority (CA) and a certificate for each node, for replicas at other\nmachines. The authority's key is needed only to issue and to renew: keep its folder\non a machine of your own, and copy to each node the folder that was issued for it.",
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return exit.Errorf(exit.Usage, "unknown command 'certs %s'%s", args[0], suggestions(cmd, args[0]))
		},
	}
	cmd.AddCommand(newCertsInit(g), newCertsIssue(g), newCertsRenew(g), newCertsShow(g))
	return cmd
}

func newCertsInit(g *globalOptions) *cobra.Command {
	var dir, name string
	var days int
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make an authority",
		Long:  "Makes an authority's certificate (ca.crt) and key (ca.key) in a folder. One that is\nthere is never overwritten.",
		Args:  atMost(0),
		RunE: func(*cobra.Command, []string) error {
			if err := certs.CheckDays(days); err != nil {
				return exit.Errorf(exit.Usage, "--days: %w", err)
			}
			info, err := certs.Init(dir, name, now(), days)
			if err != nil {
				return certsError(err, "nothing was overwritten: choose another folder with --ca, or move it away; without its key no node's certificate can be renewed")
			}
			return g.say(map[string]any{"certificate": info}, "%s: %v, %s; next: blockferry certs issue NODE", dir, info, info.Expiry(now()))
		},
	}
	cmd.Flags().StringVar(&dir, "ca", defaultAuthority, "the authority's folder")
	cmd.Flags().StringVar(&name, "name", "blockferry", "the authority's name, as shown to people")
	cmd.Flags().IntVar(&days, "days", certs.DefaultCADays, "how long it is good for")
	return cmd
}

func newCertsIssue(g *globalOptions) *cobra.Command {
	var ca, out string
	var days int
	cmd := &cobra.Command{
		Use:   "issue NODE",
		Short: "Make a node's folder: its key, its certificate, and what it trusts",
		Long:  "Makes a new key and a certificate for a node's name (node.pem) and puts the\nauthority's certificate (ca.crt) beside it. Copy that folder to the node, readable\nby root alone, and name it there with 'certs' under 'node'.",
		Args:  exactly(1, "NODE"),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := certs.CheckDays(days); err != nil {
				return exit.Errorf(exit.Usage, "--days: %w", err)
			}
			if err := certs.CheckNodeName(args[0]); err != nil {
				return exit.Mark(exit.Usage, err)
			}
			if out == "" {
				out = filepath.Join(ca, "nodes", args[0])
			}
			authority, err := certs.OpenAuthority(ca, now())
			if err != nil {
				return certsError(err, "name an authority's folder with --ca, or make one: blockferry certs init")
			}
			info, err := authority.Issue(out, args[0], now(), days)
			if err != nil {
				return certsError(err, "nothing was overwritten: to replace it: blockferry certs renew "+out)
			}
			return g.say(map[string]any{"certificate": info}, "%s: %v, %s; copy the folder to the node and name it there: node: {name: %s, certs: ...}",
				out, info, info.Expiry(now()), info.Name)
		},
	}
	cmd.Flags().StringVar(&ca, "ca", defaultAuthority, "the authority's folder")
	cmd.Flags().StringVar(&out, "out", "", "the node's folder; default: nodes/NODE in the authority's")
	cmd.Flags().IntVar(&days, "days", certs.DefaultNodeDays, "how long it is good for, at most as long as the authority")
	return cmd
}

func newCertsRenew(g *globalOptions) *cobra.Command {
	var ca string
	var days int
	cmd := &cobra.Command{
		Use:   "renew FOLDER",
		Short: "Replace a node's key and certificate by new ones for the same name",
		Long:  "Replaces node.pem in a node's folder, in one step. A running agent takes it at its\nnext connection. What the node trusts (ca.crt) stays as it is.",
		Args:  exactly(1, "FOLDER"),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := certs.CheckDays(days); err != nil {
				return exit.Errorf(exit.Usage, "--days: %w", err)
			}
			authority, err := certs.OpenAuthority(ca, now())
			if err != nil {
				return certsError(err, "name an authority's folder with --ca")
			}
			was, is, err := authority.Renew(args[0], now(), days)
			if err != nil {
				return certsError(err, "name the folder that 'blockferry certs issue' made, or a copy of it")
			}
			return g.say(map[string]any{"replaced": was, "certificate": is}, "%s: %v, %s; it replaces %s, which %s", args[0], is, is.Expiry(now()), was.Fingerprint, was.Expiry(now()))
		},
	}
	cmd.Flags().StringVar(&ca, "ca", defaultAuthority, "the authority's folder")
	cmd.Flags().IntVar(&days, "days", certs.DefaultNodeDays, "how long it is good for, at most as long as the authority")
	return cmd
}

func newCertsShow(g *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "show [PATH]",
		Short: "Say of each certificate whose it is and when it expires",
		Long:  "PATH is a folder of a node or an authority, or a file; without it, the folder that\nthe configuration names.",
		Args:  atMost(1),
		RunE: func(_ *cobra.Command, args []string) error {
			var path string
			if len(args) > 0 {
				path = args[0]
			} else {
				c, err := config.Load(g.config)
				if err != nil {
					return err
				}
				if c.Node == nil || c.Node.Certs == "" {
					return exit.Errorf(exit.Usage, "%s names no 'certs' under 'node': say which folder", g.config)
				}
				path = c.Node.Certs
			}
			all, err := certs.Show(path)
			if err != nil {
				return certsError(err, "name a folder that 'blockferry certs' made")
			}
			for _, info := range all {
				if err := g.say(map[string]any{"certificate": info, "expires-in-seconds": int64(info.NotAfter.Sub(now()).Seconds())},
					"%s: %v, %s", info.Path, info, info.Expiry(now())); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// certsError gives an error its code, and what to do.
func certsError(err error, advice string) error {
	code := exit.Failed
	switch {
	case errors.Is(err, certs.ErrExists):
		code = exit.Refused
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		code = exit.Prerequisite
	}
	return exit.Errorf(code, "%w; %s", err, advice)
}
