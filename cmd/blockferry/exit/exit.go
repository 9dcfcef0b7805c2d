// Package exit is the one table of exit codes, and the one switch from an
// error to its code. The same table carries a code over the agent's socket,
// so that a refusal in the agent ends the command as a refusal.
package exit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"blockferry/cmd/blockferry/config"
)

// Code is how a command ends.
type Code int

// The codes. They are part of the command line's promise: new ones may be
// added, none changes its meaning.
const (
	OK           Code = 0
	Failed       Code = 1
	Usage        Code = 2
	Refused      Code = 3
	Differs      Code = 4
	Unreachable  Code = 5
	Timeout      Code = 6
	Prerequisite Code = 7
	Interrupted  Code = 130
)

// Row is a line of the table.
type Row struct {
	Code    Code
	Word    string // in JSON errors
	grpc    codes.Code
	Meaning string
}

// Table lists every code once, in ascending order.
func Table() []Row {
	return []Row{
		{OK, "ok", codes.OK, "What was asked for is done."},
		{Failed, "failed", codes.Internal, "Something failed on the way; the message says what and where."},
		{Usage, "usage", codes.InvalidArgument, "The command line or the configuration is wrong. Nothing was touched."},
		{Refused, "refused", codes.FailedPrecondition, "Refused for safety, for example because a disk holds somebody's data. Nothing was written."},
		{Differs, "differs", codes.DataLoss, "A verify or a restore found blocks that differ; with --repair: they still do, or may."},
		{Unreachable, "unreachable", codes.Unavailable, "The agent does not answer; is it running?"},
		{Timeout, "timeout", codes.DeadlineExceeded, "The limit given with --timeout passed first; what was begun goes on. Or that of a snapshot's --limit; its command was ended."},
		{Prerequisite, "prerequisite", codes.Unimplemented, "Something blockferry needs is missing: root, a kernel module, a device."},
		{Interrupted, "interrupted", codes.Canceled, "Interrupted by a signal, as shells number it."},
	}
}

type marked struct {
	code Code
	err  error
}

func (m *marked) Error() string { return m.err.Error() }
func (m *marked) Unwrap() error { return m.err }

// Mark gives an error its code. The outermost mark counts.
func Mark(code Code, err error) error {
	if err == nil {
		return nil
	}
	return &marked{code, err}
}

// Errorf makes a marked error.
func Errorf(code Code, format string, args ...any) error {
	return Mark(code, fmt.Errorf(format, args...))
}

// Of is the switch from an error to its code.
func Of(err error) Code {
	var m *marked
	var c *config.Error
	switch {
	case err == nil:
		return OK
	case errors.As(err, &m):
		return m.code
	case errors.As(err, &c):
		return Usage
	case errors.Is(err, context.DeadlineExceeded):
		return Timeout
	case errors.Is(err, context.Canceled):
		return Interrupted
	}
	if s, ok := status.FromError(err); ok {
		for _, row := range Table() {
			if row.grpc == s.Code() {
				return row.Code
			}
		}
	}
	return Failed
}

// ToWire makes the error that a gRPC handler returns.
func ToWire(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	code := Of(err)
	for _, row := range Table() {
		if row.Code == code {
			return status.Error(row.grpc, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}

// FromWire turns what a gRPC call returned into a marked error with the plain
// message that the agent gave.
func FromWire(err error) error {
	if s, ok := status.FromError(err); ok && err != nil {
		return Mark(Of(err), errors.New(s.Message()))
	}
	return err
}

// JSON is the last error as one line for programs.
func JSON(err error) string {
	code := Of(err)
	word := ""
	for _, row := range Table() {
		if row.Code == code {
			word = row.Word
		}
	}
	line, _ := json.Marshal(map[string]any{"error": map[string]any{
		"exit-code": int(code), "kind": word, "message": err.Error()}})
	return string(line)
}

// Markdown is docs/exit-codes.md.
func Markdown() string {
	var b strings.Builder
	b.WriteString("# Exit codes\n\nEvery command ends with one of these. With `--json` the last error is one line of JSON on standard error:\n" +
		"`{\"error\":{\"exit-code\":3,\"kind\":\"refused\",\"message\":\"...\"}}`.\n\n| code | kind | meaning |\n| --- | --- | --- |\n")
	for _, row := range Table() {
		fmt.Fprintf(&b, "| %d | %s | %s |\n", row.Code, row.Word, row.Meaning)
	}
	return b.String()
}
